"""The plain encoding: one tensor in one dtype, any rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch

from ..errors import SmeltError, nearest
from .base import Encoding, Parts
from .expr import Cast, Expr, Load, k, n

DTYPES = (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
)  # fmt: skip


@dataclass(frozen=True)
class Dense(Encoding):
    """Elements as they are, in `dtype`. One part: `data`, shaped like the logical tensor (0-d and 1-d included)."""

    name: ClassVar[str] = "dense"
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise SmeltError(
                f"dense: unknown dtype '{self.dtype}'{nearest(str(self.dtype), DTYPES)}; known: {', '.join(DTYPES)}"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def encode(self, x: torch.Tensor, tables: Parts | None = None) -> dict[str, torch.Tensor]:
        """`data`: x in the stored dtype; a finite value that overflows it is an error."""
        data = x.to(self.torch_dtype)
        if data.is_floating_point() and data.dtype != x.dtype and bool((data.isinf() & x.isfinite()).any()):
            raise SmeltError(f"{self}: a finite value overflows {self.dtype}; use dtype: bfloat16 or float32")
        return {"data": data}

    def decode(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Floating data converted to `dtype`; integer and boolean tables as they are."""
        data = parts["data"]
        return data.to(dtype) if data.is_floating_point() else data

    def stored_bits(self, shape: tuple[Any, ...]) -> sympy.Expr:
        """Elements times stored bits each (a boolean takes a byte)."""
        return sympy.prod(shape, start=sympy.Integer(8 * self.torch_dtype.itemsize))

    def expr(self, shape: tuple[Any, ...]) -> Expr:
        """`data[n * K + k]`; floating data as float32. A 1-d tensor is one row."""
        index = n * shape[-1] + k if len(shape) > 1 else k if shape else sympy.Integer(0)
        load = Load("data", sympy.sympify(index), self.dtype)
        return Cast("float32", load) if self.torch_dtype.is_floating_point and self.dtype != "float32" else load

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        """Nothing: every shape fits."""
        return None
