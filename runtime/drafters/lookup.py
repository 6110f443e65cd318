"""Prompt lookup (Saxena, 2023): what followed the last tokens earlier in the context, found by an index that grows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...ir.decode import Lookup
from .base import Drafted, Growing, History

SURE = {1: 0.35, 2: 0.6}  # guesses: the first copied token is right, by tokens that agree; more: 0.8
FADES = 0.9  # with each further token


class LookupDrafter(History):
    """An index from n-grams to where they end. A lookup costs one look for each length, however long the context."""

    def __init__(self, draft: Lookup, vocabulary: int, rows: int) -> None:
        super().__init__(rows)
        self.draft = draft
        self._ends: list[dict[tuple[int, ...], list[int]]] = [{} for _ in range(rows)]

    def extend(self, row: int, tokens: Sequence[int]) -> None:
        known, ends = self.tokens[row], self._ends[row]
        for token in tokens:
            for n in range(self.draft.shortest, min(self.draft.longest, len(known)) + 1):
                ends.setdefault(tuple(known[-n:]), []).append(len(known))
            known.append(token)

    def propose(self, row: int) -> Drafted:
        known = self.tokens[row]
        tree = Growing(known[-1])
        for branch, (agree, start) in enumerate(self._matches(row)):
            node, likely = 0, SURE.get(agree, 0.8) / (branch + 1)
            for token in known[start : start + self.draft.tokens]:
                node = tree.add(node, token, likely)
                likely *= FADES
        return tree.drafted()

    def _matches(self, row: int) -> Iterator[tuple[int, int]]:
        """(tokens that agree, where the continuation starts): longest first, then newest; each continuation once."""
        known, ends = self.tokens[row], self._ends[row]
        found: set[int] = set()
        for n in range(min(self.draft.longest, len(known)), self.draft.shortest - 1, -1):
            for start in reversed(ends.get(tuple(known[-n:]), ())):
                if known[start] not in found:  # others that begin alike differ, if at all, further on
                    found.add(known[start])
                    yield n, start
                if len(found) == self.draft.branches:
                    return
