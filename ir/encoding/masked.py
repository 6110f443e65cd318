"""Values of another encoding with a bit for each that says whether it stays; else it is 0 (Zhao et al., 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch

from ..errors import SmeltError
from . import packing
from .base import Encoding, Parts
from .expr import Bin, Cast, Expr, k, renamed

OF, BIT = "a_", "b_"  # before the names of parts, as in a sum


@dataclass(frozen=True)
class Masked(Encoding):
    """`x = of(x) · bit` on `[..., N, K]`.

    Masking as an Efficient Alternative to Finetuning (arXiv 2004.12406): several masks share the values. Parts: those
    of `of` with `a_` before their names, which may so be the parts of another weight (`ir.weight.Upon`), and `b_codes`
    int16 `[..., N, K/16]`, of which an element holds sixteen neighbours.
    """

    name: ClassVar[str] = "masked"
    of: Encoding

    def __post_init__(self) -> None:
        if not isinstance(self.of, Encoding):
            raise SmeltError("masked: of is an encoding, such as {dense: float16}")

    @property
    def calibrated(self) -> bool:
        """If that of the values is."""
        return self.of.calibrated

    @property
    def closes(self) -> int:
        """As that of the values."""
        return self.of.closes

    def fit(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The tables of the values."""
        return {OF + part: value for part, value in self.of.fit(x, weight).items()}

    def encode(self, x: torch.Tensor, tables: Parts | None = None) -> dict[str, torch.Tensor]:
        """The values, and a bit for those that are not 0."""
        if reason := self.refuses(tuple(x.shape)):
            raise SmeltError(f"{self}: {reason}")
        values = self.of.encode(x, _of(tables or {}) or None)
        return {**{OF + part: value for part, value in values.items()}, **self.bits(x != 0)}

    def bits(self, kept: torch.Tensor) -> dict[str, torch.Tensor]:
        """The own part, for a mask bool [..., N, K]."""
        return {BIT + part: value for part, value in packing.pack(kept.to(torch.uint8), 1).items()}

    def decode(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The values where their bits are, zeros elsewhere."""
        kept = packing.unpack({"codes": parts[BIT + "codes"]}, 1, shape[-1]).bool()
        return self.of.decode(_of(parts), shape, dtype).masked_fill(~kept, 0)

    def stored_bits(self, shape: tuple[Any, ...]) -> sympy.Expr:
        """Those of the values, and one each."""
        return sympy.expand(self.of.stored_bits(shape) + sympy.prod(shape))

    def table_bits(self, shape: tuple[Any, ...]) -> sympy.Expr:
        """Those of the values."""
        return self.of.table_bits(shape)

    def expr(self, shape: tuple[Any, ...]) -> Expr:
        """`value * bit`."""
        bit = renamed(packing.field(1, shape[-1], k), BIT)
        return Bin("mul", renamed(self.of.expr(shape), OF), Cast("float32", bit))

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        """What the values refuse, and rows that do not fill their words."""
        if len(shape) < 2:
            return f"needs a tensor [..., N, K], not {list(shape)}"
        if shape[-1] == 0 or shape[-1] % packing.block(1):
            return f"the last dim, {shape[-1]}, must be a multiple of {packing.block(1)} (1-bit packing)"
        return self.of.refuses(shape)


def _of(parts: Parts) -> dict[str, torch.Tensor]:
    """The parts of the values by their own names."""
    return {name.removeprefix(OF): part for name, part in parts.items() if name.startswith(OF)}
