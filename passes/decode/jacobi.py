"""Drafts with a window of guesses that are chosen anew in every step (Speculative Jacobi Decoding, 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ...ir import decode
from ...ir.program import Program
from ..base import Effect, Exactness, Outcome, Pass, Samples
from ._join import join, joinable


@dataclass(frozen=True)
class Jacobi(Pass):
    """What the model chose behind guesses that were not accepted are the guesses of the next step.

    window: guesses.

    Deviations: the paper decodes images, accepts by rejection with the laws that guesses were drawn from, and draws
    anew; here the noise is keyed by position, so that guesses repeat themselves, and the walk accepts them.
    """

    exactness: ClassVar[Exactness] = Exactness.EXACT
    effects: ClassVar[frozenset[Effect]] = frozenset({"decode"})

    window: int = 16

    def __post_init__(self) -> None:
        self._draft()

    def requires(self, program: Program) -> Iterator[str]:
        """A decoder with a cache plan and no other drafter."""
        return joinable(program, self._draft())

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Set the decode plan; the graph stays as it is."""
        join(program, self._draft())
        return Outcome(("decode",), notes={"rows": 1 + self._draft().most})

    def _draft(self) -> decode.Jacobi:
        return decode.Jacobi(self.window)
