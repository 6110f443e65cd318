"""Sparse matrices without a pattern: a bit for each element, and the values of those that are not zero, in order."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import sympy
import torch

from ..errors import SmeltError
from .base import Encoding, Parts, checked, stored_as
from .expr import Expr

ROWS, COLUMNS = 16, 4  # rows whose bits are one word, and columns that kernels read at once
SPARE = 16  # values behind the last, so that a whole vector can be read from any place
DTYPES = ("float16", "bfloat16")


@dataclass(frozen=True)
class Bitmap(Encoding):
    """What is not zero in a matrix `[N, K]`, in `dtype`: a bit and the share of such elements times 16 bits.

    Elements are in the order of tiles of sixteen rows, column by column and down each column. Parts: `mask` int16
    `[N / 16, K]`, the first row in the lowest bit; `value` `[count + 16]`; `start` int64 `[N / 16]`, the first value of
    each tile. Rows are filled up to sixteen with zeros.

    count: values that are stored. It comes from the data, so that two matrices are stored alike whatever they are;
    `coded` finds it.
    """

    name: ClassVar[str] = "bitmap"
    dtype: str = "float16"
    count: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise SmeltError(f"bitmap: dtype must be float16 or bfloat16, not {self.dtype!r}")
        if type(self.count) is not int or self.count < 0:
            raise SmeltError(f"bitmap: count is a number of values, not {self.count!r}")

    @property
    def form(self) -> Bitmap:
        """Without the count."""
        return replace(self, count=0)

    def coded(self, x: torch.Tensor) -> tuple[Bitmap, dict[str, torch.Tensor]]:
        """This encoding with the count of a matrix, and its parts."""
        tiled = _tiled(checked(self, x))  # [N / 16, K, 16]
        held = tiled != 0
        bits = (held.int() << torch.arange(ROWS, device=x.device)).sum(-1)
        counts = held.sum((1, 2))
        value = torch.nn.functional.pad(stored_as(self, tiled[held], "value", self.dtype), (0, SPARE))
        mask = torch.where(bits >= 1 << 15, bits - (1 << 16), bits).to(torch.int16)
        parts = {"mask": mask, "start": counts.cumsum(0) - counts, "value": value}
        return replace(self, count=int(counts.sum())), parts

    def encode(self, x: torch.Tensor, tables: Parts | None = None) -> dict[str, torch.Tensor]:
        """The parts of a matrix that has just so many values."""
        found, parts = self.coded(x)
        if found.count != self.count:
            raise SmeltError(f"{self}: the matrix has {found.count} values; `coded` finds what its data needs")
        return parts

    def decode(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The values where their bits are, zeros elsewhere."""
        mask = parts["mask"].int()
        held = mask[..., None] >> torch.arange(ROWS, device=mask.device) & 1 != 0
        tiled = torch.zeros(held.shape, dtype=dtype, device=mask.device)
        tiled[held] = parts["value"][: len(parts["value"]) - SPARE].to(dtype)
        return tiled.transpose(1, 2).reshape(-1, shape[1])[: shape[0]].contiguous()

    def stored_bits(self, shape: tuple[Any, ...]) -> sympy.Expr:
        """A bit an element in whole tiles, where each begins, and the values."""
        tiles = sympy.ceiling(sympy.sympify(shape[0]) / ROWS)
        return tiles * (ROWS * shape[1] + 64) + 16 * (self.count + SPARE)

    def expr(self, shape: tuple[Any, ...]) -> Expr:
        """None: where a value stands depends on all before it."""
        raise SmeltError(
            f"{self.name}: values are found only in the order in which they are stored, by kernels for CPUs"
        )

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        """What is no matrix, or has rows of no whole steps."""
        if len(shape) != 2:
            return f"needs a tensor [N, K], not {list(shape)}"
        if 0 in shape or shape[1] % COLUMNS:
            return f"rows of {shape[1]} are no multiple of {COLUMNS}"
        return None


def _tiled(x: torch.Tensor) -> torch.Tensor:
    """[N, K] as [N / 16, K, 16], filled up with zeros."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, -len(x) % ROWS))
    tiles: torch.Tensor = padded.unflatten(0, (-1, ROWS))
    return tiles.transpose(1, 2)
