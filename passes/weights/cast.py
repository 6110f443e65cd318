"""Weight matrices in another floating-point type: what a method needs that stores only this type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ...ir.encoding import Dense
from ...ir.errors import SmeltError
from ...ir.program import Program
from ...ir.weight import Weight
from ..base import Effect, Exactness, Outcome, Pass, Samples
from ..measure import sqnr
from ._matrices import matrices


@dataclass(frozen=True)
class Cast(Pass):
    """Rounds weight matrices to the nearest number of a type; what is encoded stays, and so do vectors.

    to: the type.
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    effects: ClassVar[frozenset[Effect]] = frozenset({"numerics", "encodings"})

    to: Literal["bfloat16", "float16"] = "bfloat16"

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Round one matrix at a time."""
        skipped: dict[str, str] = {}
        noise: dict[str, float] = {}
        wanted = Dense(self.to)
        for name, matrix in matrices(program).items():
            old = program.weights[name]
            if isinstance(matrix, str) or old.encoding == wanted or not isinstance(old.encoding, Dense):
                skipped[name] = matrix if isinstance(matrix, str) else f"stored as {old.encoding}"
                continue
            dense = old.dense()
            try:
                new = Weight(old.shape, wanted, wanted.encode(dense))
            except SmeltError as error:
                raise SmeltError(f"{name}: {error}") from error
            noise[name] = min(sqnr(dense, new.dense()), 999.0)  # JSON has no infinity
            program.weights[name] = new
            program.touch(name)
        if not noise:
            return Outcome((), skipped)
        worst = min(noise, key=noise.__getitem__)
        notes: dict[str, Any] = {"sqnr_db": {"min": round(noise[worst], 2)}, "worst": worst}
        return Outcome(tuple(noise), skipped, notes)
