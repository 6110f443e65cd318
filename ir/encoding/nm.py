"""N:M sparsity: of every few neighbours in a row a fixed number is kept, in any storage, with the places of each.

Accelerating Sparse Deep Neural Networks (Mishra et al., 2021, arXiv 2104.08378) describes 2:4, which processors know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch

from ..errors import SmeltError
from . import packing
from .affine import Affine
from .base import Encoding, Parts, checked
from .dense import Dense
from .expr import Expr, Scatter, k, renamed, slot, substitute

PLACED = 4  # places in neighbouring bytes: a kernel's lane reads four bytes of its row at once
FLOATS = ("float16", "bfloat16", "float32")
HALF = Dense("float16")


@dataclass(frozen=True)
class NM(Encoding):
    """`keep` of every `of` neighbours in the rows of `[..., N, K]`, both powers of two; the others are 0.

    `values` stores the kept ones as a matrix `[..., N, K keep / of]` that has them in their order: `dense`, or `affine`
    by token, where a group is one of kept values. Parts: those of `values` with `value_` before their names, and
    `place_codes` (with `place_high`), the places of the kept ones among their neighbours, ascending.
    """

    name: ClassVar[str] = "nm"
    keep: int
    of: int
    values: Encoding = HALF

    def __post_init__(self) -> None:
        if type(self.of) is not int or self.of not in (2, 4, 8, 16):
            raise SmeltError(f"nm: of is 2, 4, 8 or 16 neighbours, not {self.of!r}")
        if type(self.keep) is not int or self.keep not in (1, 2, 4, 8) or self.keep >= self.of:
            raise SmeltError(f"nm: keep is 1, 2, 4 or 8 and less than of={self.of}, not {self.keep!r}")
        values = self.values
        plain = isinstance(values, Dense) and values.dtype in FLOATS
        if not plain and not (isinstance(values, Affine) and values.axis == "token"):
            raise SmeltError(f"nm: values is dense floating point, or affine with axis: token, not {values}")

    @property
    def bits(self) -> int:
        """Of a place."""
        return self.of.bit_length() - 1

    def chosen(self, score: torch.Tensor) -> torch.Tensor:
        """The columns to keep of each row by a score `[..., N, K]`: int64 `[..., N, K keep / of]`, ascending."""
        groups = score.unflatten(-1, (-1, self.of))
        places = groups.topk(self.keep, -1).indices.sort(-1).values
        columns: torch.Tensor = places + self.of * torch.arange(groups.shape[-2], device=score.device)[:, None]
        return columns.flatten(-2)

    def columns(self, parts: Parts, shape: tuple[int, ...]) -> torch.Tensor:
        """The columns that are kept, int64 `[..., N, K keep / of]`."""
        count = self._kept(shape)[-1]
        places = packing.unpack(_under("place_", parts), self.bits, count, PLACED).long()
        return places + torch.arange(count, device=places.device) // self.keep * self.of

    def encode(self, x: torch.Tensor, tables: Parts | None = None) -> dict[str, torch.Tensor]:
        """Those of largest magnitude, which are all that a sparse matrix has."""
        return self.at(x, self.chosen(checked(self, x).abs()))

    def at(self, x: torch.Tensor, columns: torch.Tensor) -> dict[str, torch.Tensor]:
        """The values in columns that were chosen elsewhere."""
        return self.parts(columns, self.values.encode(checked(self, x).gather(-1, columns)))

    def parts(self, columns: torch.Tensor, values: Parts) -> dict[str, torch.Tensor]:
        """Parts of columns and the parts of their values."""
        places = packing.pack((columns % self.of).to(torch.uint8), self.bits, PLACED)
        held = {f"place_{part}": value.contiguous() for part, value in places.items()}
        return {**{f"value_{part}": value.contiguous() for part, value in values.items()}, **held}

    def decode(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The values in their places, zeros elsewhere."""
        values = self.values.decode(_under("value_", parts), self._kept(shape))
        whole = torch.zeros(shape, device=values.device)
        return whole.scatter_(-1, self.columns(parts, shape), values).to(dtype)

    def stored_bits(self, shape: tuple[Any, ...]) -> sympy.Expr:
        """The values and a place for each."""
        kept = self._kept(shape)
        return sympy.expand(self.values.stored_bits(kept) + self.bits * sympy.prod(kept))

    def expr(self, shape: tuple[Any, ...]) -> Expr:
        """The values of a group where the column is theirs. Products need not search for them: see `kept`."""
        entry = {k: self.keep * sympy.floor(k / self.of) + slot}
        value, place = (substitute(expr, entry) for expr in self.kept(shape))
        return Scatter(place, value, self.keep, sympy.Mod(k, self.of))

    def kept(self, shape: tuple[Any, ...]) -> tuple[Expr, Expr]:
        """The value and the place (int32, below `of`) of row `n` and kept column `k`."""
        listed = self._kept((None, shape[-1]))
        place = packing.field(self.bits, listed[-1], k, PLACED)
        return renamed(self.values.expr(listed), "value_"), renamed(place, "place_")

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        """A rank below 2, rows of no whole groups or whose places fill no words, or values that do not fit."""
        if len(shape) < 2:
            return f"needs a tensor [..., N, K], not {list(shape)}"
        block = packing.block(self.bits, PLACED) * self.of // self.keep
        if shape[-1] == 0 or shape[-1] % block:
            return f"the last dim, {shape[-1]}, must be a multiple of {block}"
        reason = self.values.refuses(self._kept(shape))
        return f"its values, {self.values}: {reason}" if reason else None

    def _kept(self, shape: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*shape[:-1], shape[-1] * self.keep // self.of)


def _under(prefix: str, parts: Parts) -> Mapping[str, torch.Tensor]:
    """The parts whose names begin so, without it."""
    return {part.removeprefix(prefix): value for part, value in parts.items() if part.startswith(prefix)}
