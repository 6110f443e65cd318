"""Lossless coding of bfloat16 weights (DFloat11: 70% Size, 100% Accuracy, Zhang et al., 2025, arXiv 2504.11651)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ...ir.encoding import Dense, Tiered
from ...ir.program import Program
from ...ir.weight import Weight
from ..base import Effect, Exactness, Outcome, Pass, Samples
from ._matrices import matrices


@dataclass(frozen=True)
class Code(Pass):
    """Stores bfloat16 matrices in some 11 bits a weight, of which kernels read the same numbers to the bit.

    Of trained weights the exponents hold 2.6 bits. Matrices that are encoded already stay as they are, so that this
    codes what a quantizer before it left; so do those that it would not shrink.

    Deviation: the paper codes exponents by Huffman's algorithm and decodes a layer into memory before its products.
    Codes of 2, 5 and 13 bits cost 0.2 bits more (`Tiered`), and products decode them as they read.
    """

    exactness: ClassVar[Exactness] = Exactness.EXACT
    effects: ClassVar[frozenset[Effect]] = frozenset({"encodings"})

    def requires(self, program: Program) -> Iterator[str]:
        """Every dense matrix must be bfloat16."""
        for name, matrix in matrices(program).items():
            encoding = program.weights[name].encoding
            if not isinstance(matrix, str) and isinstance(encoding, Dense) and encoding != Dense("bfloat16"):
                yield (
                    f"weights of {name} must be bfloat16, whose exponents are coded, but are {encoding}"
                    f"{program.changed_by(name)}: round them first by weights.cast: {{to: bfloat16}}"
                )
                return

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Code one matrix at a time."""
        skipped: dict[str, str] = {}
        done: list[str] = []
        before = after = 0
        for name, matrix in matrices(program).items():
            old = program.weights[name]
            new = old if isinstance(matrix, str) else _coded(old)
            if isinstance(matrix, str) or isinstance(new, str):
                skipped[name] = matrix if isinstance(matrix, str) else str(new)
                continue
            program.weights[name] = new
            program.touch(name)
            done.append(name)
            before, after = before + old.nbytes, after + new.nbytes
        if not done:
            return Outcome((), skipped)
        notes = {"bits_per_weight": round(16 * after / before, 4), "bytes": {"before": before, "after": after}}
        return Outcome(tuple(done), skipped, notes)


def _coded(weight: Weight) -> Weight | str:
    """The weight coded, or why it stays."""
    if not isinstance(weight.encoding, Dense):
        return f"stored as {weight.encoding}"
    if reason := Tiered().refuses(weight.shape):
        return reason
    encoding, parts = Tiered.coded(weight.parts["data"])
    coded = Weight(weight.shape, encoding, parts)
    if coded.bits >= weight.bits:
        return f"its exponents are too many: coded it has {coded.bits} bits, and {weight.bits} as it is"
    return coded
