"""Chimera (Zeng et al., 2024): one pass of a layer over the model's features, whose heads fill a static tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ...ir.decode import Fused, Model
from ..sampling import Sampling
from ..session import Session
from .base import Drafted
from .feature import FeatureDrafter
from .largest import largest

BEFORE = "before"


class FusedDrafter(FeatureDrafter):
    """Place t of the draft's cache holds the feature of token t and tokens t - 1 to t + 1, all as the model has them.

    The draft model's logits behind the pending token [J, V] fill the tree; no drafted token is read by it.
    """

    def __init__(self, draft: Fused, session: Session, sampling: Sampling, requests: torch.Tensor) -> None:
        super().__init__(Model(draft.tree, draft.width), session, sampling, requests)
        self._width, self._tree = draft.width, draft.tree
        self._head = (torch.tensor(draft.tree.depths) - 1).clamp_min(0)
        self._rank = torch.tensor(draft.tree.ranks)

    def propose_all(self, rows: Sequence[int]) -> dict[int, Drafted]:
        made = {row: Drafted.chain(self.tokens[row][-1:]) for row in rows}
        if fitting := [row for row in rows if len(self.tokens[row]) <= self.session.cache.capacity]:
            self._read(fitting)
            best = largest(self._roots[fitting], self._width)[:, self._head, self._rank]
            for row, tokens in zip(fitting, best.tolist(), strict=True):
                made[row] = Drafted([self.tokens[row][-1], *tokens[1:]], self._tree.parents)
        return made

    def _known(self, features: torch.Tensor) -> Mapping[str, torch.Tensor]:
        before = torch.zeros(*features.shape[:2], 2, dtype=torch.int64)
        for row, start in enumerate(self.session.cache.lengths):
            tokens = self.tokens[row][max(0, start - 1) : start + features.shape[1]]
            pairs = torch.tensor(tokens if start else [0, *tokens]).unfold(0, 2, 1)  # in front of the first stands 0
            before[row, : len(pairs)] = pairs
        return {**super()._known(features), BEFORE: before}
