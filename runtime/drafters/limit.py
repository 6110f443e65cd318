"""A drafter held to a number of tokens: the likeliest of what another one proposes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .base import Drafted, Drafter, Verified
from .union import likeliest, usual


class LimitedDrafter(Drafter):
    """Asks a drafter and keeps at most `nodes` of its tokens. Shapes that never change are cut once."""

    def __init__(self, drafter: Drafter, nodes: int) -> None:
        self.drafter, self.nodes = drafter, nodes
        self.harvests, self.watches, self.fixed = drafter.harvests, drafter.watches, drafter.fixed
        self._kept: list[int] | None = None

    def begin(self, row: int, tokens: Sequence[int]) -> None:
        self.drafter.begin(row, tokens)

    def harvest(self, row: int, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        self.drafter.harvest(row, tokens, logits)

    def watch(self, row: int, outputs: Mapping[str, torch.Tensor]) -> None:
        self.drafter.watch(row, outputs)

    def observe(self, row: int, verified: Verified) -> None:
        self.drafter.observe(row, verified)

    def propose_all(self, rows: Sequence[int]) -> dict[int, Drafted]:
        return {row: self._cut(draft) for row, draft in self.drafter.propose_all(rows).items()}

    def _cut(self, draft: Drafted) -> Drafted:
        if len(draft.tokens) <= self.nodes + 1:
            return draft
        if self.fixed:
            return self._cut_alike(draft)
        return likeliest([draft], self.nodes)

    def _cut_alike(self, draft: Drafted) -> Drafted:
        """The same nodes at every step; parents stand before their children, and are never less likely."""
        if self._kept is None:
            likely = draft.likely or usual(draft.parents)
            order = sorted(range(1, len(likely)), key=lambda node: (-likely[node], node))
            self._kept = [0, *sorted(order[: self.nodes])]
        places = {node: place for place, node in enumerate(self._kept)}
        parents = tuple(places[draft.parents[node]] for node in self._kept)
        return Drafted([draft.tokens[node] for node in self._kept], parents)
