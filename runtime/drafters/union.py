"""Several drafters at once: their trees are laid over each other, and the likeliest nodes are verified."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import torch

from ...ir.decode import usual_rates
from .base import Drafted, Drafter, Growing, Verified

RATES = usual_rates(256)


class UnionDrafter(Drafter):
    """Asks every drafter; a node that several propose counts once, with the largest of their probabilities."""

    def __init__(self, drafters: Sequence[Drafter], nodes: int) -> None:
        self.drafters, self.nodes = drafters, nodes
        self.harvests = any(each.harvests for each in drafters)
        self.watches = any(each.watches for each in drafters)

    def begin(self, row: int, tokens: Sequence[int]) -> None:
        for each in self.drafters:
            each.begin(row, tokens)

    def harvest(self, row: int, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        for each in self.drafters:
            if each.harvests:
                each.harvest(row, tokens, logits)

    def watch(self, row: int, outputs: Mapping[str, torch.Tensor]) -> None:
        for each in self.drafters:
            each.watch(row, outputs)

    def observe(self, row: int, verified: Verified) -> None:
        for each in self.drafters:
            each.observe(row, verified)

    def propose_all(self, rows: Sequence[int]) -> dict[int, Drafted]:
        found = [each.propose_all(rows) for each in self.drafters]
        return {row: self._joined([drafts[row] for drafts in found]) for row in rows}

    def _joined(self, drafts: Sequence[Drafted]) -> Drafted:
        return likeliest(drafts, self.nodes)


def usual(parents: Sequence[int]) -> list[float]:
    """Probabilities of a static tree's nodes whose siblings stand best first."""
    likely, ranks = [1.0], [0] * len(parents)
    for parent in parents[1:]:
        rank = ranks[parent]
        ranks[parent] += 1
        likely.append(likely[parent] * RATES[rank])
    return likely


def likeliest(drafts: Sequence[Drafted], nodes: int) -> Drafted:
    """The likeliest nodes of drafts laid over each other, each with all above it; no child counts as likelier."""
    tree = Growing(drafts[0].tokens[0])
    for draft in drafts:
        chances, places = draft.likely or usual(draft.parents), [0]
        for node in range(1, len(draft.tokens)):
            places.append(tree.add(places[draft.parents[node]], draft.tokens[node], chances[node]))
    if len(tree) <= nodes + 1:
        return tree.drafted()
    children: list[list[int]] = [[] for _ in tree.tokens]
    for node, parent in enumerate(tree.parents):
        if node:
            children[parent].append(node)
    out = Growing(tree.tokens[0])
    heap = [(-tree.likely[node], node, 0) for node in children[0]]
    heapq.heapify(heap)
    while heap and len(out) <= nodes:
        likely, node, parent = heapq.heappop(heap)
        at = out.add(parent, tree.tokens[node], -likely)
        for child in children[node]:
            heapq.heappush(heap, (max(likely, -tree.likely[child]), child, at))
    return out.drafted()
