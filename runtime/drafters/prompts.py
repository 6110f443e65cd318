"""Parallel Prompt Decoding (Chen et al., 2024): prompt tokens run behind nodes, and guess what stands further on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...ir.decode import Prompts, Sparse, sparse
from .base import Aside, Drafted, Drafter, Verified
from .largest import largest


class PromptsDrafter(Drafter):
    """The logits at the prompt tokens behind the last accepted node, through as much of a sparse tree as they reach."""

    def __init__(self, draft: Prompts, vocabulary: int, rows: int) -> None:
        shape = sparse(draft.rates, draft.rows)
        self._cuts = [_Cut(shape, known, vocabulary) for known in range(max(shape.prompts) + 1)]
        self._width = max(shape.tree.ranks) + 1
        self._known: list[torch.Tensor] = [torch.zeros(0, self._width, dtype=torch.int64)] * rows  # [places, width]
        self._pending = [0] * rows

    def begin(self, row: int, tokens: Sequence[int]) -> None:
        self._pending[row] = tokens[-1]

    def observe(self, row: int, verified: Verified) -> None:
        if not verified.fresh:
            return
        self._pending[row] = verified.fresh[-1]
        rows = self._cuts[len(self._known[row])].behind[verified.path[-1]]
        self._known[row] = largest(verified.outputs["logits"][rows.start : rows.stop], self._width)

    def propose(self, row: int) -> Drafted:
        known = self._known[row]
        return self._cuts[len(known)].drafted(self._pending[row], known)


class _Cut:
    """The nodes of a sparse tree that guesses for `known` places reach, and the prompt tokens behind them."""

    def __init__(self, shape: Sparse, known: int, vocabulary: int) -> None:
        nodes = sum(depth <= known for depth in shape.tree.depths)  # shorter paths come first
        depths = shape.tree.depths[:nodes]
        self.parents = shape.tree.parents[:nodes]
        self._place = torch.tensor(depths[1:], dtype=torch.int64) - 1
        self._rank = torch.tensor(shape.tree.ranks[1:nodes], dtype=torch.int64)
        behind = [(node, j) for node in range(nodes) for j in range(shape.prompts[node])]
        seen = torch.zeros(len(behind), 1 + len(behind), dtype=torch.bool)
        seen[:, 0] = True
        self.behind: list[range] = []  # of each node, the rows of the step
        for prompts in shape.prompts[:nodes]:
            first = self.behind[-1].stop if self.behind else nodes
            self.behind.append(range(first, first + prompts))
            at = first - nodes
            seen[at : at + prompts, 1 + at : 1 + at + prompts] = torch.ones(prompts, prompts).tril().bool()
        tokens, places = [vocabulary + j for _, j in behind], [depths[node] + 1 + j for node, j in behind]
        self._aside = Aside(tokens, places, seen, [node for node, _ in behind])

    def drafted(self, pending: int, known: torch.Tensor) -> Drafted:
        """The draft behind the pending token; known int64 [places, width], the likeliest tokens of each place."""
        return Drafted([pending, *known[self._place, self._rank].tolist()], self.parents, aside=self._aside)
