"""Drafting pauses while it does not pay: what tokens cost with drafts and without is measured as they are made."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from math import inf
from typing import TypeAlias

Emitted: TypeAlias = list[tuple[int, list[int]]]
"""What a step gave: (row, its new tokens)."""

LOOK = 4  # steps after which a way is judged; the slowest, which may have bound kernels, is left out
LEAST, MOST = 8, 256  # how many times as long as a look takes the better way goes on before the next one


class Pace:
    """Which way the next tokens are made: with drafts, or without.

    The way whose tokens cost less goes on, and the other one is looked at now and then: a look that changes nothing
    doubles the time until the next one, so that looks take a ninth of the time at most, and soon far less. A way is
    left, too, as soon as it costs more than the other one did. Only the walk, which emits what plain decoding would
    whoever drafts, may be paced: the clock then decides when tokens come, and not which.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.drafts = True
        self._clock = clock
        self._taken: list[tuple[float, float]] = []  # seconds, and tokens a row, of the steps since the last judgement
        self._costs = {True: inf, False: inf}  # seconds a token, with drafts and without
        self._better = True
        self._fresh = True  # whether the way was just taken up
        self._looks = False
        self._times, self._left = LEAST, 0.0  # of the better way: looks that it lasts for, seconds until the next one

    def watched(self, steps: Generator[Emitted, None, None]) -> Iterator[Emitted]:
        """What these steps, made in the present way, give, until it is time for the other way."""
        way = self.drafts
        with closing(steps):
            while self.drafts is way:
                start = self._clock()
                emitted = next(steps, None)
                if emitted is None:
                    return
                self._took(self._clock() - start, sum(len(tokens) for _, tokens in emitted) / max(1, len(emitted)))
                yield emitted

    def _took(self, seconds: float, tokens: float) -> None:
        self._taken.append((seconds, tokens))
        if len(self._taken) == LOOK:
            usual = _usual([seconds for seconds, _ in self._taken])
            self._judge(usual, usual / sum(tokens for _, tokens in self._taken))
            self._taken.clear()

    def _judge(self, seconds: float, cost: float) -> None:
        """Take the way for the next steps. The last ones took `seconds`, `cost` for each token of a row."""
        way = self.drafts
        self._costs[way] = cost if self._fresh else (self._costs[way] + cost) / 2
        self._left -= seconds
        better = self._costs[True] <= self._costs[False]
        if self._looks or better is not way:
            self._times = min(2 * self._times, MOST) if better is self._better else LEAST
            self._better, self._looks, self._left = better, False, self._times * seconds
            self.drafts = better
        elif self._left <= 0:
            self._looks, self.drafts = True, not better
        self._fresh = self.drafts is not way


def _usual(seconds: Sequence[float]) -> float:
    """What steps take together if the slowest took what the others do."""
    return (sum(seconds) - max(seconds)) * len(seconds) / max(1, len(seconds) - 1)
