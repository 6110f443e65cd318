"""Token Recycling (Luo et al., 2024): the best successors last seen behind each token, read along a static tree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from ...ir.decode import Recycle
from .base import Drafted, Drafter, Verified
from .largest import largest

Find: TypeAlias = Callable[[torch.Tensor], npt.NDArray[np.int64]]


class RecycleDrafter(Drafter):
    """An adjacency matrix of tokens that all rows share.

    Where one token occurs twice in a harvest, the later place wins: the deeper tree node, the later prompt token.
    """

    harvests = fixed = True

    def __init__(self, draft: Recycle, vocabulary: int, rows: int, find: Find | None = None) -> None:
        """`find`: the ids [n, width] of the largest logits [n, V], where a kernel finds them."""
        self.width = draft.width
        self._find: Find = find or (lambda logits: largest(logits, draft.width).numpy())
        self.matrix = np.zeros((vocabulary, draft.width), np.int64)
        self._tree = draft.tree
        self._steps = list(zip(draft.tree.parents, draft.tree.ranks, strict=True))[1:]
        self._pending = [0] * rows

    def begin(self, row: int, tokens: Sequence[int]) -> None:
        self._pending[row] = tokens[-1]

    def harvest(self, row: int, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        self.matrix[tokens.numpy()] = self._find(logits)  # of equal indices the last one counts

    def observe(self, row: int, verified: Verified) -> None:
        if verified.fresh:
            self._pending[row] = verified.fresh[-1]

    def propose(self, row: int) -> Drafted:
        tokens, behind = [self._pending[row]], dict[int, list[int]]()
        for parent, rank in self._steps:
            if parent not in behind:
                behind[parent] = self.matrix[tokens[parent]].tolist()
            tokens.append(behind[parent][rank])
        return Drafted(tokens, self._tree.parents)
