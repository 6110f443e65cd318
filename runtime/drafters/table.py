"""Token Recycling (Luo et al., 2024): the best successors last seen behind each token, read along a static tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from ...ir.decode import Recycle, Tree
from .base import Drafted, Drafter, Verified
from .largest import largest

Indices: TypeAlias = npt.NDArray[np.int64]


class RecycleDrafter(Drafter):
    """An adjacency matrix of tokens that all rows share.

    Where one token occurs twice in a harvest, the later place wins: the deeper tree node, the later prompt token.
    """

    harvests = fixed = True

    def __init__(self, draft: Recycle, vocabulary: int, rows: int) -> None:
        self.width = draft.width
        self.matrix = np.zeros((vocabulary, draft.width), np.int64)
        self._levels = _levels(draft.tree)
        self._tree = draft.tree
        self._pending = [0] * rows

    def begin(self, row: int, tokens: Sequence[int]) -> None:
        self._pending[row] = tokens[-1]

    def harvest(self, row: int, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        self.matrix[tokens.numpy()] = largest(logits, self.width).numpy()  # of equal indices the last one counts

    def observe(self, row: int, verified: Verified) -> None:
        if verified.fresh:
            self._pending[row] = verified.fresh[-1]

    def propose(self, row: int) -> Drafted:
        tokens = np.full(len(self._tree), self._pending[row])
        for nodes, parents, ranks in self._levels:
            tokens[nodes] = self.matrix[tokens[parents], ranks]
        return Drafted(tokens.tolist(), self._tree.parents)


def _levels(tree: Tree) -> list[tuple[Indices, Indices, Indices]]:
    """(nodes, parents, ranks) of each depth below the root."""
    depths, parents, ranks = (np.array(column) for column in (tree.depths, tree.parents, tree.ranks))
    found = [np.flatnonzero(depths == depth) for depth in range(1, max(tree.depths) + 1)]
    return [(nodes, parents[nodes], ranks[nodes]) for nodes in found]
