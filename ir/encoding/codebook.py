"""Codes of several neighbouring channels at once: the nearest of a table of vectors.

KV Cache is 1 Bit Per Channel: Efficient Large Language Model Inference with Coupled Quantization (2024, arXiv
2405.03917): a learned codebook for each group of channels. AQLM (2024, arXiv 2401.06118) shares them; HIGGS (2024,
arXiv 2411.17525) takes the grid that is optimal for a Gaussian, which needs no data, and a norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch

from ..errors import SmeltError, nearest
from . import clusters, packing
from .base import Encoding, Parts, checked, stored_as, table
from .expr import Bin, Cast, Const, Expr, Index, Take, k, n, number

KINDS = ("learned", "gaussian")
WIDTHS = (1, 2, 3, 4, 5, 6, 8, 9, 10)
ANY = (1 << 31) - 1  # entries of a table whose number follows from a width that is not known


@dataclass(frozen=True)
class Codebook(Encoding):
    """The nearest of 2^bits vectors of `dims` neighbouring channels, on `[..., N, K]`: bits / dims bits a number.

    `kind="learned"`: by k-means over samples (`fit`, weighted), one codebook for each group of channels, or one for all
    if `shared`. `kind="gaussian"`: the grid with the least error on N(0, I), the same everywhere. With `norm` a row is
    divided by its root mean square first.

    Parts: codes of each row, packed neighbour by neighbour: `codes` uint8, and `high` for 3, 5, 6, 9 and 10 bits; with
    `norm` also `scale` float16 `[..., N, 1]`. Table: `book` float16 `[K / dims or 1, 2^bits, dims]`.
    """

    name: ClassVar[str] = "codebook"
    dims: int
    bits: int
    kind: str = "learned"
    shared: bool = False
    norm: bool = False

    def __post_init__(self) -> None:
        if type(self.dims) is not int or self.dims < 1:
            raise SmeltError(f"codebook: dims must be a positive number of channels, not {self.dims!r}")
        if type(self.bits) is not int or self.bits not in WIDTHS:
            raise SmeltError(
                f"codebook: bits of a code must be one of {', '.join(map(str, WIDTHS))}, not {self.bits!r}"
            )
        if self.kind not in KINDS:
            raise SmeltError(
                f"codebook: kind must be learned or gaussian, not {self.kind!r}{nearest(str(self.kind), KINDS)}"
            )
        for option in ("shared", "norm"):
            if type(getattr(self, option)) is not bool:
                raise SmeltError(f"codebook: {option} must be true or false, not {getattr(self, option)!r}")

    @property
    def calibrated(self) -> bool:
        """If the codebooks are learned."""
        return self.kind == "learned"

    def fit(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Codebooks of each matrix x [..., N, K]; a vector's weight is the sum over its channels."""
        if not self.calibrated:
            return {"book": self._grid(x.device)[None]}
        x, _ = self._normed(checked(self, x))
        lead, groups = x.shape[:-2], x.shape[-1] // self.dims
        vectors = x.unflatten(-1, (groups, self.dims)).movedim(-2, -3).reshape(-1, groups, x.shape[-2], self.dims)
        mass = self._mass(weight, x, groups)
        if self.shared:
            vectors = vectors.reshape(-1, 1, groups * x.shape[-2], self.dims)
            mass = mass.reshape(-1, 1, groups * x.shape[-2]) if mass is not None else None
        books = [
            clusters.fitted(group, None if mass is None else mass[i, g], 2**self.bits)
            for i, each in enumerate(vectors)
            for g, group in enumerate(each)
        ]
        return {
            "book": stored_as(self, torch.stack(books), "centre", "float16").reshape(*lead, -1, 2**self.bits, self.dims)
        }

    def encode(self, x: torch.Tensor, tables: Parts | None = None) -> dict[str, torch.Tensor]:
        """The nearest vectors' numbers, and the norms."""
        x, scale = self._normed(checked(self, x))
        groups, lead = x.shape[-1] // self.dims, x.shape[:-2]
        book = self._book(tables, len(lead), x.device)
        vectors = x.unflatten(-1, (groups, self.dims)).movedim(-2, -3)  # [..., groups, N, dims]
        book = book.expand(*lead, groups, *book.shape[-2:]).reshape(-1, 2**self.bits, self.dims)
        found = [
            clusters.assigned(v, b)[0] for v, b in zip(vectors.reshape(-1, x.shape[-2], self.dims), book, strict=True)
        ]
        codes = torch.stack(found).reshape(*lead, groups, x.shape[-2]).movedim(-1, -2) if found else vectors[..., 0].mT
        parts = packing.pack(codes.int().contiguous(), self.bits, lanes=1)
        return parts if scale is None else {**parts, "scale": scale}

    def decode(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The vectors of the codes, times the norms, in float32, then `dtype`."""
        groups = shape[-1] // self.dims
        codes = packing.unpack(parts, self.bits, groups, lanes=1).long().movedim(-1, -2)  # [..., groups, N]
        book = self._book(parts, len(shape) - 2, codes.device)
        book = book.expand(*shape[:-2], groups, *book.shape[-2:])
        held = book.gather(-2, codes[..., None].expand(*codes.shape, self.dims))
        held = held.movedim(-3, -2).reshape(shape)
        return (held * parts["scale"].float() if self.norm else held).to(dtype)

    def stored_bits(self, shape: tuple[Any, ...]) -> sympy.Expr:
        """Codes and norms."""
        rows = sympy.prod(shape[:-1])
        return sympy.expand(rows * sympy.sympify(shape[-1]) / self.dims * self.bits + (16 * rows if self.norm else 0))

    def table_bits(self, shape: tuple[Any, ...]) -> sympy.Expr:
        """The codebooks of each leading entry; the Gaussian grid once."""
        one = 16 * 2**self.bits * self.dims
        if not self.calibrated:
            return sympy.Integer(one)
        books = 1 if self.shared else sympy.sympify(shape[-1]) / self.dims
        return sympy.expand(sympy.prod(shape[:-2]) * books * one)

    def expr(self, shape: tuple[Any, ...]) -> Expr:
        """`book[k // dims][code of k // dims][k % dims] * scale`."""
        columns = sympy.sympify(shape[-1])
        group, entries = sympy.floor(k / self.dims), 2**self.bits * self.dims
        at: Expr = packing.field(self.bits, sympy.floor(columns / self.dims), group, lanes=1)
        if self.dims > 1:
            at = Bin("mul", at, Const(self.dims, "int32"))
        first = sympy.Mod(k, self.dims) if self.dims > 1 else sympy.Integer(0)
        books: Any = 1 if self._one else columns / self.dims
        if not self._one:
            first += entries * group
        if first != 0:
            at = Bin("add", at, Index(first))
        size = int(books * entries) if sympy.sympify(books).is_number else ANY
        value: Expr = Cast("float32", Take("book", size, at, "float16"))
        return Bin("mul", value, number("scale", n, "float16")) if self.norm else value

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        """A rank below 2, rows that are no whole vectors, or whose codes fill no whole bytes."""
        if len(shape) < 2:
            return f"needs a tensor [..., N, K], not {list(shape)}"
        if shape[-1] == 0 or shape[-1] % self.dims:
            return f"vectors of dims={self.dims} channels do not divide a row of {shape[-1]}"
        block = packing.block(self.bits, lanes=1)
        if shape[-1] // self.dims % block:
            return f"a row has {shape[-1] // self.dims} codes, not a multiple of {block} ({self.bits}-bit packing)"
        return None

    @property
    def _one(self) -> bool:
        return self.shared or not self.calibrated

    def _grid(self, device: torch.device) -> torch.Tensor:
        return clusters.gaussian(self.dims, 2**self.bits).to(device).half()[None]

    def _book(self, tables: Parts | None, lead: int, device: torch.device) -> torch.Tensor:
        if not self.calibrated and (tables is None or "book" not in tables):
            return self._grid(device).float()
        return table(self, tables, "book", 3, lead)

    def _normed(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not self.norm:
            return x, None
        scale = stored_as(self, x.square().mean(-1, keepdim=True).sqrt(), "scale", "float16")
        return x / torch.where(scale == 0, 1.0, scale.float()), scale

    def _mass(self, weight: torch.Tensor | None, x: torch.Tensor, groups: int) -> torch.Tensor | None:
        """Weights of vectors, [leading entries, groups, N]."""
        if weight is None:
            return None
        each = weight if weight.dim() == x.dim() else weight[..., None].expand(x.shape)
        vectors: torch.Tensor = each.reshape(x.shape).unflatten(-1, (groups, self.dims)).sum(-1)
        return vectors.mT.reshape(-1, groups, x.shape[-2])
