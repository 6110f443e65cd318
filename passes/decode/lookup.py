"""Drafts by copying what followed the last tokens earlier in the context (prompt lookup, Saxena, 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ...ir import decode
from ...ir.program import Program
from ..base import Effect, Exactness, Outcome, Pass, Samples
from ._join import join, joinable


@dataclass(frozen=True)
class Lookup(Pass):
    """The longest run of last tokens that occurred before is found by an index; what followed it is verified.

    longest, shortest: tokens that must agree.
    tokens: how many are copied.
    branches: different continuations that are verified at once.

    Deviations: the newest of equally long agreements is taken, where released codes take the first; prompts and answers
    are looked up alike.
    """

    exactness: ClassVar[Exactness] = Exactness.EXACT
    effects: ClassVar[frozenset[Effect]] = frozenset({"decode"})

    longest: int = 3
    shortest: int = 1
    tokens: int = 10
    branches: int = 1

    def __post_init__(self) -> None:
        self._draft()

    def requires(self, program: Program) -> Iterator[str]:
        """A decoder with a cache plan that does not look up yet."""
        return joinable(program, decode.Lookup)

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Add the drafter to the decode plan; the graph stays as it is."""
        join(program, self._draft())
        return Outcome(("decode",))

    def _draft(self) -> decode.Lookup:
        return decode.Lookup(self.longest, self.shortest, self.tokens, self.branches)
