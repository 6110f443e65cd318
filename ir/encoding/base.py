"""How a logical tensor is stored: the interface that every encoding implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import sympy
import torch

from .expr import Expr

Parts = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Encoding(ABC):
    """Stores a logical tensor `[..., N, K]` as named parts; the dataclass fields are its parameters.

    An encoding is a value: it holds no tensors, compares and hashes by its parameters, and prints as a spec
    `{name: {field: value}}` that `parse` in this package reads back.
    """

    name: ClassVar[str]

    @abstractmethod
    def encode(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode `x [..., N, K]`; raises SmeltError naming the encoding if the shape does not fit."""

    @abstractmethod
    def decode(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The reference meaning: parts back to `[..., N, K]` in plain PyTorch."""

    @abstractmethod
    def bits(self, shape: tuple[Any, ...]) -> sympy.Expr:
        """Stored bits for a logical shape (ints or sympy symbols), scales, zeros, indices and tables counted."""

    @abstractmethod
    def expr(self, shape: tuple[Any, ...]) -> Expr:
        """The value at row `n`, column `k` as a tile expression over the parts, for codegen to splice."""

    @abstractmethod
    def refuses(self, shape: tuple[int, ...]) -> str | None:
        """Why this shape cannot be stored, or None."""

    def spec(self) -> dict[str, dict[str, Any]]:
        """The recipe form, `{name: {field: value}}`."""
        return {self.name: {f.name: getattr(self, f.name) for f in fields(self)}}

    def __str__(self) -> str:
        """The text form, `affine(bits=4, group=32)`."""
        options = ", ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))
        return f"{self.name}({options})"
