"""Scores of candidates: what is known is looked up, the rest is evaluated and written down."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ._journal import Journal
from ._space import Candidate, Space
from ._workers import Workers


class Scores:
    """Mean KL of candidates over rows of text. `made` counts the evaluations that were run, `known` those looked up.

    `tell(done, total)` is called for each that is run of those asked for at once.
    """

    def __init__(self, space: Space, journal: Journal, workers: Workers) -> None:
        self.made = self.known = 0
        self.tell: Callable[[int, int], None] = lambda done, total: None
        self._space, self._journal, self._workers = space, journal, workers

    def __call__(self, candidates: Sequence[Candidate], rows: Sequence[int]) -> list[float]:
        """One for each candidate, in nats."""
        asked: dict[str, tuple[Candidate, list[int]]] = {}
        for candidate in candidates:
            key = self._space.key(candidate)
            held = self._journal.known.get(key, {})
            if missing := [row for row in rows if row not in held]:
                asked[key] = candidate, missing
            else:
                self.known += 1
        for number, (candidate, found) in enumerate(self._workers(list(asked.values()))):
            self._journal.add(self._space.key(candidate), found)
            self.made += 1
            self.tell(number + 1, len(asked))
        return [self._mean(candidate, rows) for candidate in candidates]

    def _mean(self, candidate: Candidate, rows: Sequence[int]) -> float:
        held = self._journal.known[self._space.key(candidate)]
        return math.fsum(held[row] for row in rows) / len(rows)
