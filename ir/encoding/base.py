"""How a logical tensor is stored: the interface that every encoding implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import sympy
import torch

from ..errors import SmeltError
from .expr import Expr

Parts = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Encoding(ABC):
    """Stores a logical tensor `[..., N, K]` as named parts; the dataclass fields are its parameters.

    An encoding is a value: it holds no tensors, compares and hashes by its parameters, and prints as a spec
    `{name: {field: value}}` that `parse` in this package reads back.

    Some have tables (codebooks, signposts, ranges of channels) that many tensors share: `fit` makes them for `[G, ...]`
    of a tensor `[G, N, K]`, `encode` takes them, and `decode` finds them among the parts. Tables of `[G, ...]` serve
    tensors `[G, P, N, K]`, those of `[1, ...]` any.
    """

    name: ClassVar[str]

    @property
    def calibrated(self) -> bool:
        """Whether the tables come from data: `encode` then needs them. Others have none, or always the same."""
        return False

    @property
    def closes(self) -> int:
        """Rows that are encoded together: those of a group that runs over tokens. 1: each row by itself."""
        return 1

    def fit(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The tables [G, ...] for tensors like x [G, N, K]; constant ones are [1, ...], and there may be none.

        `weight`: how much an error counts, such as Fisher information, like x or one number a row [G, N].
        """
        return {}

    @abstractmethod
    def encode(self, x: torch.Tensor, tables: Parts | None = None) -> dict[str, torch.Tensor]:
        """The parts of `x [..., N, K]` but its tables.

        Raises SmeltError naming the encoding if the shape does not fit, a value cannot be stored, or tables that come
        from data are missing.
        """

    @abstractmethod
    def decode(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The reference meaning: parts and tables back to `[..., N, K]` in plain PyTorch."""

    def alone(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The parts of a tensor that has tables of its own, such as a matrix of weights."""
        tables = self.fit(x, weight)
        return {**self.encode(x, tables or None), **tables}

    @abstractmethod
    def stored_bits(self, shape: tuple[Any, ...]) -> sympy.Expr:
        """Stored bits for a logical shape (ints or sympy symbols), scales, zeros and indices counted, tables not."""

    def table_bits(self, shape: tuple[Any, ...]) -> sympy.Expr:
        """Bits of the tables that tensors of a logical shape share."""
        return sympy.Integer(0)

    @abstractmethod
    def expr(self, shape: tuple[Any, ...]) -> Expr:
        """The value at row `n`, column `k` as a tile expression over the parts and tables, for codegen to splice.

        Raises SmeltError where a value is no such expression.
        """

    @abstractmethod
    def refuses(self, shape: tuple[int, ...]) -> str | None:
        """Why this shape cannot be stored, or None."""

    @property
    def form(self) -> Encoding:
        """Itself without what was counted in the data: all that a kernel depends on."""
        return self

    def spec(self) -> dict[str, dict[str, Any]]:
        """The recipe form, `{name: {field: value}}`; what is None is left out."""
        return {self.name: {name: _plain(value) for name, value in Encoding._options(self).items()}}

    def __str__(self) -> str:
        """The text form, `affine(bits=4, group=32)`."""
        return f"{self.name}({', '.join(f'{key}={_text(value)}' for key, value in self._options().items())})"

    def _options(self) -> dict[str, Any]:
        """The parameters by their names in a spec."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in held.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, Encoding):
        return value.spec()
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


def _text(value: Any) -> str:
    return f"[{', '.join(map(_text, value))}]" if isinstance(value, tuple) else str(value)


def checked(encoding: Encoding, x: torch.Tensor) -> torch.Tensor:
    """x in float32, if the encoding takes its shape and every value is a number; else SmeltError."""
    if reason := encoding.refuses(tuple(x.shape)):
        raise SmeltError(f"{encoding}: {reason}")
    x = x.float()
    if not bool(x.isfinite().all()):
        raise SmeltError(f"{encoding}: the tensor has NaN or infinite values")
    return x


def stored_as(encoding: Encoding, value: torch.Tensor, part: str, dtype: str) -> torch.Tensor:
    """The value in a storage dtype; refuses what that dtype cannot hold."""
    stored = value.to(getattr(torch, dtype))
    if not bool(stored.isfinite().all()):
        if not bool(value.isfinite().all()):
            raise SmeltError(f"{encoding}: the tensor has NaN or infinite values")
        wider = "scale: float32" if hasattr(encoding, "scale") else "numbers of less magnitude"
        raise SmeltError(f"{encoding}: a {part} overflows {dtype} ({value.abs().max():.3g}); use {wider}")
    return stored


def table(encoding: Encoding, tables: Parts | None, name: str, rank: int, lead: int) -> torch.Tensor:
    """A table in float32, shaped to broadcast against a tensor with `lead` dims before those that the table has.

    `rank`: dims of the table itself. Its leading dims are the first of the tensor's. Raises SmeltError if it is not
    there.
    """
    if tables is None or name not in tables:
        raise SmeltError(
            f"{encoding}: its table '{name}' comes from data and is missing; calibrate first, or pass "
            "`tables=encoding.fit(samples)`"
        )
    held = tables[name].float()
    own = held.shape[held.dim() - rank :]
    led = list(held.shape[: held.dim() - rank])
    while len(led) > lead and led[0] == 1:
        led = led[1:]
    if len(led) > lead:
        raise SmeltError(
            f"{encoding}: its table '{name}' is {list(held.shape)}, for a tensor with more dims than given"
        )
    return held.reshape(*led, *([1] * (lead - len(led))), *own)
