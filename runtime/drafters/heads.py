"""Medusa (Cai et al., 2024): a node at depth d takes its rank among the best of head d - 1 at the last token."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...ir.decode import Heads
from .base import Drafted, Drafter, Verified
from .largest import largest


class HeadsDrafter(Drafter):
    """The model's output `heads` [T, J, V] at the last accepted node, through a static tree."""

    fixed = True

    def __init__(self, draft: Heads, vocabulary: int, rows: int) -> None:
        self.width, self._tree = draft.width, draft.tree
        self._head = (torch.tensor(draft.tree.depths) - 1).clamp_min(0)
        self._rank = torch.tensor(draft.tree.ranks)
        self._best: list[torch.Tensor | None] = [None] * rows
        self._pending = [0] * rows

    def begin(self, row: int, tokens: Sequence[int]) -> None:
        self._pending[row] = tokens[-1]

    def observe(self, row: int, verified: Verified) -> None:
        self._best[row] = largest(verified.outputs["heads"][verified.path[-1]], self.width)  # [J, width]
        if verified.fresh:
            self._pending[row] = verified.fresh[-1]

    def propose(self, row: int) -> Drafted:
        best = self._best[row]
        if best is None:
            raise RuntimeError(f"row {row}: heads propose only after a step was observed")
        tokens: list[int] = best[self._head, self._rank].tolist()
        tokens[0] = self._pending[row]
        return Drafted(tokens, self._tree.parents)
