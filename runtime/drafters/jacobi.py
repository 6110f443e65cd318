"""Jacobi decoding: a window of guesses, each chosen anew behind the former ones (Speculative Jacobi Decoding, 2024)."""

from __future__ import annotations

from collections.abc import Sequence

from ...ir.decode import Jacobi
from .base import Drafted, History, Verified, chosen_behind


class JacobiDrafter(History):
    """What the model chose behind the guesses that were not accepted becomes the guesses for the next places.

    The verifier's noise is keyed by position, so that a guess that was drawn behind a wrong prefix is often drawn again
    behind the right one: the coupling that the paper reaches by remembering laws.
    """

    fixed = True

    def __init__(self, draft: Jacobi, vocabulary: int, rows: int) -> None:
        super().__init__(rows)
        self.window = draft.window
        self._guesses: list[list[int]] = [[] for _ in range(rows)]

    def begin(self, row: int, tokens: Sequence[int]) -> None:
        super().begin(row, tokens)
        self._guesses[row] = self._filled(row, [])

    def observe(self, row: int, verified: Verified) -> None:
        super().observe(row, verified)
        if verified.fresh:
            chosen = chosen_behind(verified, range(len(verified.fresh), self.window + 1))
            self._guesses[row] = self._filled(row, chosen)

    def propose(self, row: int) -> Drafted:
        return Drafted.chain([self.tokens[row][-1], *self._guesses[row]])

    def _filled(self, row: int, guesses: list[int]) -> list[int]:
        """The guesses, and as many of the row's own tokens behind them as are missing: what was said is said again."""
        missing = self.window - len(guesses)
        own = self.tokens[row][-missing:] if missing else []
        return guesses + own + [self.tokens[row][-1]] * (missing - len(own))
