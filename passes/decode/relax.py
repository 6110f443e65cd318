"""Rules of acceptance that trade the model's law for longer accepted drafts: typical, near, trusted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from ...ir import decode
from ...ir.program import Program
from ..base import Effect, Exactness, Outcome, Pass, Samples
from .accept import accept, valid


@dataclass(frozen=True)
class Relax(Pass):
    """What is generated has no longer the model's law, and no bound says how far it is.

    rule: `typical` accepts what exceeds min(epsilon, alpha · exp(-entropy)) (Medusa, 2024); `near` what is among the
        `top` likeliest tokens, or loses at most `regret` nats against them over a whole draft (Blockwise Parallel
        Decoding, 2018); `trust` accepts all (Entropy Adaptive Decoding, 2025).
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    effects: ClassVar[frozenset[Effect]] = frozenset({"decode"})

    rule: Literal["typical", "near", "trust"] = "typical"
    epsilon: float = 0.09
    alpha: float = 0.3
    top: int = 1
    regret: float = 0.0

    def __post_init__(self) -> None:
        self._rule()

    def requires(self, program: Program) -> Iterator[str]:
        """A drafter."""
        yield from valid(program, self._rule())

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Set the rule; the graph stays as it is."""
        accept(program, self._rule())
        return Outcome(("decode",))

    def _rule(self) -> decode.Accept:
        if self.rule == "typical":
            return decode.Typical(self.epsilon, self.alpha)
        return decode.Near(self.top, self.regret) if self.rule == "near" else decode.Trust()
