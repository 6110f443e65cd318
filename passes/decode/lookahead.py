"""Drafts with n-grams of a Jacobi window that runs beside the verified tokens (Lookahead Decoding, Fu et al., 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ...ir import decode
from ...ir.program import Program
from ..base import Effect, Exactness, Outcome, Pass, Samples
from ._join import join, joinable


@dataclass(frozen=True)
class Lookahead(Pass):
    """Rows of the step beside the tree run the window; what they choose becomes n-grams that are verified later.

    window: columns; ngram: tokens of an n-gram, one more than the window has levels.
    guesses: n-grams that are kept for each first token, and verified at once.

    Deviations: the window starts with tokens of the prompt, whose own n-grams fill the pool; released code starts at
    random and with an empty pool.
    """

    exactness: ClassVar[Exactness] = Exactness.EXACT
    effects: ClassVar[frozenset[Effect]] = frozenset({"decode"})

    window: int = 7
    ngram: int = 5
    guesses: int = 7

    def __post_init__(self) -> None:
        self._draft()

    def requires(self, program: Program) -> Iterator[str]:
        """A decoder with a cache plan and no other drafter."""
        return joinable(program, self._draft())

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Set the decode plan; the graph stays as it is."""
        join(program, self._draft())
        return Outcome(("decode",), notes={"rows": 1 + self._draft().most})

    def _draft(self) -> decode.Lookahead:
        return decode.Lookahead(self.window, self.ngram, self.guesses)
