"""Weight-only integers that make up for their errors on sample text (GPTQ, Frantar et al., 2023, arXiv 2210.17323)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ...ir.encoding import NM, Affine, Encoding
from ...ir.errors import SmeltError
from ...ir.ops import EXPERTS, is_op
from ...ir.program import Program
from ...ir.weight import Weight
from ..base import Calibration, Effect, Outcome, Pass, Samples
from ._gptq import Solved, solve
from ._in_order import finite, in_order, told
from ._matrices import all_dense, matrices, stored_in
from ._range import Range, check, encode


@dataclass(frozen=True)
class Gptq(Pass):
    """Rounds matrices column by column to integer codes, the later columns making up for the error of the earlier.

    Products are treated in the order in which they run, each on what the rounded ones before it leave of the sample
    text; lookup tables are rounded to the nearest code, and routed experts stay as they are.

    bits: width of a code.
    group: neighbours in a row that share a scale; 0 is the whole row.
    zero: whether groups have a zero of their own; without, codes are symmetric.
    range: how a group's scale is found: from its largest weight, or where the error is least (`mse`, to the power 2.4).
    order: columns with large inputs are rounded first. Groups stay neighbours in the row.
    damp: share of the mean second moment of the inputs that is added to each; raised, and reported, where the moments
        are singular.
    tokens: how much a token counts: all alike, or by the attention that it gets in its layer (RSQ, Sung et al., 2025,
        arXiv 2503.01820).
    least: what a token counts that gets no attention, where the most attended counts 1.
    head: width of the vocabulary matrices, which are the head and every lookup table: `same` takes `bits`, `keep`
        leaves them as they are.
    scale: type in which scales are stored.

    Deviations: a group's scale is fitted to its columns as they stand when the first of them is rounded, with the
    errors of columns in the same block of 128 carried over; the released code fits it to the columns without those.
    """

    effects: ClassVar[frozenset[Effect]] = frozenset({"numerics", "encodings"})
    bits: Literal[2, 3, 4, 8] = 4
    group: int = 128
    zero: bool = False
    range: Range = "mse"
    order: bool = False
    damp: float = 0.01
    tokens: Literal["alike", "attended"] = "alike"
    least: float = 0.1
    head: Literal["keep", 8, "same"] = 8
    scale: Literal["float16", "bfloat16", "float32"] = "float16"

    @property
    def calibration(self) -> Calibration:
        return "text"

    def __post_init__(self) -> None:
        """Refuses options that no matrix can satisfy."""
        if self.group < 0:
            raise SmeltError(f"group is a count of weights (0: the whole row), but is {self.group}")
        if not 0 <= self.damp < math.inf:
            raise SmeltError(f"damp is a share of the mean second moment, but is {self.damp}")
        if not 0 < self.least <= 1:
            raise SmeltError(f"least is a share above 0 and at most 1, but is {self.least}")
        check(self.range, self.bits, self.zero)

    def requires(self, program: Program) -> Iterator[str]:
        """Every matrix that would be encoded must still be dense, or what N:M sparsity keeps of it."""
        names = [name for name, how in self._plan(program).items() if not isinstance(how, str)]
        yield from all_dense(program, names, sparse=True)

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Solve the products of one tensor after the other; what a run that was broken off has finished is taken up."""
        if samples is None:
            raise SmeltError("weights.gptq needs sample texts: pass calibration texts to compile")
        plan = self._plan(program)
        skipped = {name: how for name, how in plan.items() if isinstance(how, str)}
        encodings = {name: how for name, how in plan.items() if not isinstance(how, str)}
        least = self.least if self.tokens == "attended" else None
        sites = in_order(program, self, samples, encodings, self._solved, self.damp, least)
        for name in encodings.keys() - sites.keys():  # tables that only lookups read
            table = encodings[name]
            assert isinstance(table, Affine)
            parts = encode(finite(name, program.weights[name]), table, self.range)
            program.weights[name] = Weight(program.weights[name].shape, table, parts)
            sites[name] = {"error": None}
        program.touch(*sites)
        return Outcome(tuple(sites), skipped, told(program, sites, samples))

    def _solved(self, weight: Weight, hessian: torch.Tensor, encoding: Encoding) -> Solved:
        assert isinstance(encoding, Affine | NM)
        sparse = weight.encoding
        columns = sparse.columns(weight.parts, weight.shape) if isinstance(sparse, NM) else None
        return solve(weight.dense(), hessian, encoding, self.range, self.order, self.damp, columns)

    def _plan(self, program: Program) -> dict[str, Affine | NM | str]:
        """The encoding of each matrix, or why it stays as it is."""
        found: dict[str, Affine | NM | str] = {}
        for name, matrix in matrices(program).items():
            if isinstance(matrix, str):
                found[name] = matrix
            elif any(is_op(reader, EXPERTS) for reader in matrix.readers):
                found[name] = "of routed experts, each of which sees little text: weights.quantize rounds them"
            elif matrix.vocabulary and self.head == "keep":
                found[name] = "a vocabulary matrix, and head is keep"
            else:
                bits = 8 if matrix.vocabulary and self.head == 8 else self.bits
                encoding = Affine(bits, self.group, zero=self.zero, scale=self.scale)
                found[name] = stored_in(program.weights[name], encoding)
        return found
