"""Drafters: each fills the nodes of the plan's static tree with candidate tokens. Nothing here decides acceptance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from ..ir.decode import DecodePlan
from ..ir.errors import SmeltError, nearest


class Drafter(Protocol):
    """Proposes tokens for a tree and learns from every verified step."""

    def harvest(self, row: int, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        """Tokens [n] and the logits [n, V] behind each, as the model gave them; drafts that were wrong included."""
        ...

    def observe(self, row: int, node: int, outputs: Mapping[str, torch.Tensor]) -> None:
        """The model's outputs [B, T, ...]; `node` is the last accepted one of `row`."""
        ...

    def propose(self, row: int, root: int) -> torch.Tensor:
        """Tokens int64 [N] of the tree whose node 0 is `root`."""
        ...


def drafter(plan: DecodePlan, vocabulary: int, rows: int) -> Drafter:
    """The drafter that a decode plan names."""
    kinds: dict[str, Callable[[DecodePlan, int, int], Drafter]] = {"recycle": Recycle, "heads": Heads}
    if plan.drafter not in kinds:
        hint = nearest(plan.drafter, kinds)
        raise SmeltError(f"unknown drafter '{plan.drafter}'{hint}; known: {', '.join(kinds)}")
    return kinds[plan.drafter](plan, vocabulary, rows)


class Recycle:
    """Token Recycling (Luo et al., 2024): the best successors last seen behind each token, as an adjacency matrix.

    Where one token occurs twice in a harvest, the later place wins: the deeper tree node, the later prompt token.
    """

    def __init__(self, plan: DecodePlan, vocabulary: int, rows: int) -> None:
        self.width = plan.width
        self.matrix = torch.zeros(vocabulary, plan.width, dtype=torch.int64)
        self._levels = _levels(plan)
        self._nodes = len(plan.tree)

    def harvest(self, row: int, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        known, places = tokens.unique(return_inverse=True)
        last = torch.zeros_like(known).scatter_reduce_(0, places, torch.arange(len(tokens)), "amax", include_self=False)
        self.matrix[known] = logits[last].topk(self.width, -1).indices

    def observe(self, row: int, node: int, outputs: Mapping[str, torch.Tensor]) -> None:
        return None

    def propose(self, row: int, root: int) -> torch.Tensor:
        tokens = torch.full((self._nodes,), root)
        for nodes, parents, ranks in self._levels:
            tokens[nodes] = self.matrix[tokens[parents], ranks]
        return tokens


class Heads:
    """Medusa (Cai et al., 2024): a node at depth d takes its rank among the best of head d - 1 at the last token."""

    def __init__(self, plan: DecodePlan, vocabulary: int, rows: int) -> None:
        self.width = plan.width
        self._head = (torch.tensor(plan.tree.depths) - 1).clamp_min(0)
        self._rank = torch.tensor(plan.tree.ranks)
        self._best: list[torch.Tensor | None] = [None] * rows

    def harvest(self, row: int, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        return None

    def observe(self, row: int, node: int, outputs: Mapping[str, torch.Tensor]) -> None:
        self._best[row] = outputs["heads"][row, node].topk(self.width, -1).indices  # [J, width]

    def propose(self, row: int, root: int) -> torch.Tensor:
        best = self._best[row]
        if best is None:
            raise RuntimeError(f"row {row}: heads propose only after a step was observed")
        tokens = best[self._head, self._rank]
        tokens[0] = root
        return tokens


def _levels(plan: DecodePlan) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(nodes, parents, ranks) of each depth below the root."""
    tree = plan.tree
    depths, parents, ranks = (torch.tensor(column) for column in (tree.depths, tree.parents, tree.ranks))
    found = [torch.nonzero(depths == depth).flatten() for depth in range(1, max(tree.depths) + 1)]
    return [(nodes, parents[nodes], ranks[nodes]) for nodes in found]
