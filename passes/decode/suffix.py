"""Drafts by the counts of what followed the longest known suffix (SuffixDecoding, Oliaro et al., 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ...ir import decode
from ...ir.program import Program
from ..base import Effect, Exactness, Outcome, Pass, Samples
from ._join import join, joinable


@dataclass(frozen=True)
class Suffix(Pass):
    """Every sequence of the request up to `depth` tokens is counted; likely continuations make a tree.

    depth: tokens that are counted, agreement and continuation together.
    factor: drafted tokens for each token that agrees, at most.
    least: continuations less probable than this are not drafted.
    nodes: drafted in a step at most.

    Deviations: only the request itself is counted, not the answers to earlier ones.
    """

    exactness: ClassVar[Exactness] = Exactness.EXACT
    effects: ClassVar[frozenset[Effect]] = frozenset({"decode"})

    depth: int = 24
    factor: float = 1.0
    least: float = 0.1
    nodes: int = 16

    def __post_init__(self) -> None:
        self._draft()

    def requires(self, program: Program) -> Iterator[str]:
        """A decoder with a cache plan that does not draft by suffixes yet."""
        return joinable(program, decode.Suffix)

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Add the drafter to the decode plan; the graph stays as it is."""
        join(program, self._draft())
        return Outcome(("decode",))

    def _draft(self) -> decode.Suffix:
        return decode.Suffix(self.depth, self.factor, self.least, self.nodes)
