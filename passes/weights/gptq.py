"""Weight-only integers that make up for their errors on sample text (GPTQ, Frantar et al., 2023, arXiv 2210.17323)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ...ir.encoding import NM, Affine, Encoding
from ...ir.errors import SmeltError
from ...ir.weight import Weight
from ._coded import Coded
from ._gptq import Solved, solve
from ._matrices import stored_in
from ._range import Range, check, encode


@dataclass(frozen=True)
class Gptq(Coded):
    """Rounds matrices column by column to integer codes, the later columns making up for the error of the earlier.

    Products are treated in the order in which they run, each on what the rounded ones before it leave of the sample
    text; lookup tables are rounded to the nearest code, and routed experts stay as they are.

    bits: width of a code.
    group: neighbours in a row that share a scale; 0 is the whole row.
    zero: whether groups have a zero of their own; without, codes are symmetric.
    range: how a group's scale is found: from its largest weight, or where the error is least (`mse`, to the power 2.4).
    order: columns with large inputs are rounded first. Groups stay neighbours in the row.
    tokens: how much a token counts: all alike, or by the attention that it gets in its layer (RSQ, Sung et al., 2025,
        arXiv 2503.01820).
    least: what a token counts that gets no attention, where the most attended counts 1.
    scale: type in which scales are stored.

    Deviations: a group's scale is fitted to its columns as they stand when the first of them is rounded, with the
    errors of columns in the same block of 128 carried over; the released code fits it to the columns without those.
    """

    sparse: ClassVar[bool] = True

    bits: Literal[2, 3, 4, 8] = 4
    group: int = 128
    zero: bool = False
    range: Range = "mse"
    order: bool = False
    tokens: Literal["alike", "attended"] = "alike"
    least: float = 0.1
    scale: Literal["float16", "bfloat16", "float32"] = "float16"

    def __post_init__(self) -> None:
        """Refuses options that no matrix can satisfy."""
        super().__post_init__()
        if self.group < 0:
            raise SmeltError(f"group is a count of weights (0: the whole row), but is {self.group}")
        if not 0 < self.least <= 1:
            raise SmeltError(f"least is a share above 0 and at most 1, but is {self.least}")
        check(self.range, self.bits, self.zero)

    @property
    def unattended(self) -> float | None:
        """`least`, where attention counts."""
        return self.least if self.tokens == "attended" else None

    def stored(self, weight: Weight, vocabulary: bool) -> Encoding | str:
        """Integers, also of what N:M sparsity keeps."""
        return stored_in(weight, Affine(8 if vocabulary else self.bits, self.group, zero=self.zero, scale=self.scale))

    def solved(self, weight: Weight, hessian: torch.Tensor, encoding: Encoding) -> Solved:
        """Column by column."""
        assert isinstance(encoding, Affine | NM)
        sparse = weight.encoding
        columns = sparse.columns(weight.parts, weight.shape) if isinstance(sparse, NM) else None
        return solve(weight.dense(), hessian, encoding, self.range, self.order, self.damp, columns)

    def rounded(self, weight: Weight, encoding: Encoding) -> Weight:
        """To the nearest code, in ranges by the same rule."""
        assert isinstance(encoding, Affine)
        return Weight(weight.shape, encoding, encode(weight.dense(), encoding, self.range))
