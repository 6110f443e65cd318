"""Codes of several neighbouring channels at once: the nearest of a table of vectors.

KV Cache is 1 Bit Per Channel: Efficient Large Language Model Inference with Coupled Quantization (2024, arXiv
2405.03917): a learned codebook for each group of channels. AQLM (2024, arXiv 2401.06118) shares them; HIGGS (2024,
arXiv 2411.17525) takes the grid that is optimal for a Gaussian, which needs no data, and a norm; JLCM (2023, arXiv
2309.17361) clusters the rows of a matrix and gives each cluster a table of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch

from ..errors import SmeltError, nearest
from . import clusters, packing
from .base import Encoding, Parts, checked, stored_as, table
from .expr import Bin, Cast, Const, Expr, Index, Load, Take, k, n, number

KINDS = ("learned", "gaussian")
WIDTHS = (1, 2, 3, 4, 5, 6, 8, 9, 10)
FEATURES = 32  # sorted values of a row by which rows are clustered
ANY = (1 << 31) - 1  # entries of a table whose number follows from a width that is not known


@dataclass(frozen=True)
class Codebook(Encoding):
    """The nearest of 2^bits vectors of `dims` neighbouring channels, on `[..., N, K]`: bits / dims bits a number.

    `kind="learned"`: by k-means over samples (`fit`, weighted), one codebook for each group of channels, or one for all
    if `shared`. `kind="gaussian"`: the grid with the least error on N(0, I), the same everywhere. With `norm` a row is
    divided by its root mean square first. With `banks` each row takes the best of so many shared codebooks.

    Parts: codes of each row, packed neighbour by neighbour: `codes` uint8, and `high` for 3, 5, 6, 9 and 10 bits; with
    `norm` also `scale` float16 `[..., N, 1]`, with several banks `bank` uint8 `[..., N, 1]`. Table: `book` float16
    `[K / dims or banks, 2^bits, dims]`.
    """

    name: ClassVar[str] = "codebook"
    dims: int
    bits: int
    kind: str = "learned"
    shared: bool = False
    norm: bool = False
    banks: int = 1

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
        if type(self.banks) is not int or not 1 <= self.banks <= 256:
            raise SmeltError(f"codebook: banks is a number of tables from 1 to 256, not {self.banks!r}")
        if self.banks > 1 and not (self.shared and self.calibrated):
            raise SmeltError(
                "codebook: banks are learned tables that a whole row takes: say kind: learned, shared: true"
            )

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
        if self.banks > 1:
            return {"book": self._banked(x, vectors, mass).reshape(*lead, self.banks, 2**self.bits, self.dims)}
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
        if self.banks > 1:
            codes, bank = self._chosen(vectors, book)
            parts = {**packing.pack(codes.int().contiguous(), self.bits, lanes=1), "bank": bank}
            return parts if scale is None else {**parts, "scale": scale}
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
        if self.banks > 1:
            codes = codes + parts["bank"].long().movedim(-1, -2) * 2**self.bits
            book = book.flatten(-3, -2).unsqueeze(-3)
        book = book.expand(*shape[:-2], groups, *book.shape[-2:])
        held = book.gather(-2, codes[..., None].expand(*codes.shape, self.dims))
        held = held.movedim(-3, -2).reshape(shape)
        return (held * parts["scale"].float() if self.norm else held).to(dtype)

    def stored_bits(self, shape: tuple[Any, ...]) -> sympy.Expr:
        """Codes, norms and the numbers of banks."""
        rows, aside = sympy.prod(shape[:-1]), 16 * self.norm + 8 * (self.banks > 1)
        return sympy.expand(rows * sympy.sympify(shape[-1]) / self.dims * self.bits + aside * rows)

    def table_bits(self, shape: tuple[Any, ...]) -> sympy.Expr:
        """The codebooks of each leading entry; the Gaussian grid once."""
        one = 16 * 2**self.bits * self.dims
        if not self.calibrated:
            return sympy.Integer(one)
        books = self.banks if self.shared else sympy.sympify(shape[-1]) / self.dims
        return sympy.expand(sympy.prod(shape[:-2]) * books * one)

    def expr(self, shape: tuple[Any, ...]) -> Expr:
        """`book[k // dims][code of k // dims][k % dims] * scale`."""
        columns = sympy.sympify(shape[-1])
        group, entries = sympy.floor(k / self.dims), 2**self.bits * self.dims
        at: Expr = packing.field(self.bits, sympy.floor(columns / self.dims), group, lanes=1)
        if self.dims > 1:
            at = Bin("mul", at, Const(self.dims, "int32"))
        first = sympy.Mod(k, self.dims) if self.dims > 1 else sympy.Integer(0)
        books: Any = self.banks if self._one else columns / self.dims
        if not self._one:
            first += entries * group
        if self.banks > 1:
            at = Bin("add", at, Bin("mul", Cast("int32", Load("bank", n, "uint8")), Const(entries, "int32")))
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

    def _banked(self, x: torch.Tensor, vectors: torch.Tensor, mass: torch.Tensor | None) -> torch.Tensor:
        """The codebooks [leading entries * banks, 2^bits, dims] of rows that are clustered by their sorted values."""
        found = []
        at = ((torch.arange(FEATURES, device=x.device) + 0.5) / FEATURES * x.shape[-1]).long()
        for i, rows in enumerate(x.reshape(-1, *x.shape[-2:])):
            shapes = rows.sort(-1).values[:, at]
            bank, _ = clusters.assigned(shapes, clusters.fitted(shapes, None, self.banks))
            for b in range(self.banks):
                mine = bank == b if bool((bank == b).any()) else torch.ones_like(bank, dtype=torch.bool)
                held = None if mass is None else mass[i][:, mine].flatten()
                found.append(clusters.fitted(vectors[i][:, mine].flatten(0, 1), held, 2**self.bits))
        return stored_as(self, torch.stack(found), "centre", "float16")

    def _chosen(self, vectors: torch.Tensor, book: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The codes [..., N, groups] of vectors [..., groups, N, dims], and the best of the banks [..., N, 1]."""
        lead, (groups, rows) = vectors.shape[:-3], vectors.shape[-3:-1]
        books = book.expand(*lead, *book.shape[-3:]).reshape(-1, *book.shape[-3:])
        codes, banks = [], []
        for each, held in zip(vectors.reshape(-1, groups * rows, self.dims), books, strict=True):
            tried = [clusters.assigned(each, one) for one in held]
            bank = torch.stack([error.reshape(groups, rows).sum(0) for _, error in tried]).argmin(0)
            numbers = torch.stack([found.reshape(groups, rows) for found, _ in tried])
            codes.append(numbers.gather(0, bank.expand(1, groups, rows))[0].mT)
            banks.append(bank.to(torch.uint8)[:, None])
        return torch.stack(codes).reshape(*lead, rows, groups), torch.stack(banks).reshape(*lead, rows, 1)

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
