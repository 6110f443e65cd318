"""One bit a number: its sign, with a magnitude a group.

QJL: 1-Bit Quantized JL Transform for KV Cache Quantization with Zero Overhead (2024, arXiv 2406.03482) keeps the signs
of a random projection; as the last term of a sum, inside of a rotation of its own, this is the second stage of
TurboQuant (2025, arXiv 2504.19874).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch

from ..errors import SmeltError
from . import packing
from .base import Encoding, Parts, checked, stored_as
from .expr import Bin, Cast, Const, Expr, k, n, number

SCALES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Sign(Encoding):
    """`x = ±scale` on `[..., N, K]`, one scale for `group` neighbours of a row (0: the row).

    The scale is the mean magnitude, with the least squared error; with `unbiased` it is Σx² / Σ|x|, which keeps the
    product of a row and its signs at Σx²: of a row that was turned at random (and not by the rotation of the term whose
    error it is), products with any vector are then right on average, at a greater error. Deviation: the paper's √(π/2)
    of the root mean square is that for Gaussians alone.

    Parts: `codes` int16 `[..., N, K/16]`, an element holds sixteen neighbours; `scale` `[..., N, K/group]`.
    """

    name: ClassVar[str] = "sign"
    group: int = 0
    unbiased: bool = False
    scale: str = "float16"

    def __post_init__(self) -> None:
        if type(self.group) is not int or self.group < 0:
            raise SmeltError(f"sign: group must be a count of elements (0: the whole row), not {self.group!r}")
        if type(self.unbiased) is not bool:
            raise SmeltError(f"sign: unbiased must be true or false, not {self.unbiased!r}")
        if self.scale not in SCALES:
            raise SmeltError(f"sign: scale must be one of {', '.join(SCALES)}, not {self.scale!r}")

    def encode(self, x: torch.Tensor, tables: Parts | None = None) -> dict[str, torch.Tensor]:
        """Signs (0 counts as positive) and magnitudes."""
        x = checked(self, x)
        size = self.group or x.shape[-1]
        groups = x.unflatten(-1, (x.shape[-1] // size, size))
        mean = groups.abs().mean(-1)
        if self.unbiased:
            mean = groups.square().mean(-1) / torch.where(mean == 0, 1.0, mean)
        return {**packing.pack((x >= 0).to(torch.uint8), 1), "scale": stored_as(self, mean, "scale", self.scale)}

    def decode(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """`±scale`."""
        signs = packing.unpack(parts, 1, shape[-1]).float() * 2 - 1
        return (signs * parts["scale"].float().repeat_interleave(self.group or shape[-1], -1)).to(dtype)

    def stored_bits(self, shape: tuple[Any, ...]) -> sympy.Expr:
        """A bit each, and the scales."""
        count = sympy.prod(shape)
        each = 8 * int(getattr(torch, self.scale).itemsize)
        return sympy.expand(count + count / sympy.sympify(self.group or shape[-1]) * each)

    def expr(self, shape: tuple[Any, ...]) -> Expr:
        """`(2 * bit - 1) * scale`."""
        columns = sympy.sympify(shape[-1])
        bit = packing.field(1, columns, k)
        sign = Bin("sub", Bin("mul", bit, Const(2, "int32")), Const(1, "int32"))
        at = n * (columns // self.group) + k // self.group if self.group else n
        return Bin("mul", Cast("float32", sign), number("scale", at, self.scale))

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        """A rank below 2, a row that does not fill its words, or is no multiple of the group."""
        if len(shape) < 2:
            return f"needs a tensor [..., N, K], not {list(shape)}"
        if shape[-1] == 0 or shape[-1] % packing.block(1):
            return f"the last dim, {shape[-1]}, must be a multiple of {packing.block(1)} (1-bit packing)"
        if self.group and shape[-1] % self.group:
            return f"dim -1 is {shape[-1]}, not a multiple of group={self.group}"
        return None
