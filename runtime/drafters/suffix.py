"""SuffixDecoding (Oliaro et al., 2024): continues the longest suffix that occurred before, as often as it did."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import count

from ...ir.decode import Suffix
from .base import Drafted, Growing, History


class _Node:
    """How often a sequence occurred, and its continuations."""

    __slots__ = ("count", "next")

    def __init__(self) -> None:
        self.count = 0
        self.next: dict[int, _Node] = {}


class SuffixDrafter(History):
    """Counts of all sequences up to `depth` tokens, of every row apart; each new token costs `depth` look-ups.

    The row's last n tokens are the path of its n-th open node, so that the longest suffix that has a continuation is
    found without a search.
    """

    def __init__(self, draft: Suffix, vocabulary: int, rows: int) -> None:
        super().__init__(rows)
        self.draft = draft
        self._roots = [_Node() for _ in range(rows)]
        self._open: list[list[_Node]] = [[] for _ in range(rows)]  # n - 1: the node of the last n tokens

    def extend(self, row: int, tokens: Sequence[int]) -> None:
        root, ends = self._roots[row], self._open[row]
        for token in tokens:
            longer = []
            for node in (root, *ends[: self.draft.depth - 1]):
                into = node.next.get(token)
                if into is None:
                    into = node.next[token] = _Node()
                into.count += 1
                longer.append(into)
            ends = longer
        self._open[row] = ends
        super().extend(row, tokens)

    def propose(self, row: int) -> Drafted:
        tree, ends = Growing(self.tokens[row][-1]), self._open[row]
        agree = next((n for n in range(len(ends), 0, -1) if ends[n - 1].next), 0)
        if not agree:
            return tree.drafted()
        most = min(self.draft.nodes, max(1, int(self.draft.factor * agree)))
        heap: list[tuple[float, int, int, int, _Node]] = []
        order = count()  # among equals the first that was seen

        def grow(parent: int, likely: float, node: _Node) -> None:
            total = sum(into.count for into in node.next.values())
            for token, into in node.next.items():
                share = likely * into.count / total
                if share >= self.draft.least:
                    heapq.heappush(heap, (-share, next(order), parent, token, into))

        grow(0, 1.0, ends[agree - 1])
        while heap and len(tree) <= most:
            likely, _, parent, token, node = heapq.heappop(heap)
            grow(tree.add(parent, token, -likely), -likely, node)
        return tree.drafted()
