"""Another encoding of rows that were turned first: outlier channels spread over all, values become nearly Gaussian.

QuIP# (2024, arXiv 2402.04396) and QuaRot (2024, arXiv 2404.00456) turn by a Hadamard matrix with random signs;
TurboQuant (2025, arXiv 2504.19874) is `rotated(by=signs, inner=nonuniform(bits=3, kind=normal, zero=False))`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch

from ..errors import SmeltError, nearest
from ..ops.hadamard import walsh
from .base import Encoding, Parts, checked
from .expr import Expr

TURNS = ("hadamard", "signs", "orthogonal")


@dataclass(frozen=True)
class Rotated(Encoding):
    """`x = inner @ rotation(K)` on `[..., N, K]`: `inner` stores `x @ rotation(K)^T`.

    `by="hadamard"`: the Hadamard matrix over √K; `signs`: behind random signs of the columns; both need a K that is a
    power of two. `orthogonal`: a random orthogonal matrix. Random ones follow from `seed`. Tables and parts are those
    of `inner`.

    A value mixes a whole row, so that no kernel decodes it by element. But `q · x = (q @ rotation^T) · inner`: a reader
    turns the query once and reads `inner`; a mix of values is turned back once (`out @ rotation`).
    """

    name: ClassVar[str] = "rotated"
    inner: Encoding
    by: str = "signs"
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Encoding):
            raise SmeltError(
                f"rotated: inner is an encoding, such as {{affine: {{bits: 4, group: 0}}}}, not {self.inner!r}"
            )
        if self.by not in TURNS:
            raise SmeltError(
                f"rotated: by must be one of {', '.join(TURNS)}, not {self.by!r}{nearest(str(self.by), TURNS)}"
            )
        if type(self.seed) is not int or self.seed < 0:
            raise SmeltError(f"rotated: seed must be a number from 0 on, not {self.seed!r}")

    def rotation(self, dim: int) -> torch.Tensor:
        """The orthogonal matrix [dim, dim], float32."""
        return _rotation(self.by, self.seed, dim)

    @property
    def calibrated(self) -> bool:
        """As the inner encoding."""
        return self.inner.calibrated

    @property
    def closes(self) -> int:
        """As the inner encoding."""
        return self.inner.closes

    def fit(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The inner tables for turned rows; weights of single elements are averaged over their row."""
        if weight is not None and weight.dim() == x.dim():
            weight = weight.mean(-1)
        return self.inner.fit(self._turned(x), weight)

    def encode(self, x: torch.Tensor, tables: Parts | None = None) -> dict[str, torch.Tensor]:
        """The inner parts of turned rows."""
        return self.inner.encode(self._turned(x), tables)

    def decode(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The inner values turned back, in float32, then `dtype`."""
        held = self.inner.decode(parts, shape)
        return (held @ self.rotation(shape[-1]).to(held.device)).to(dtype)

    def stored_bits(self, shape: tuple[Any, ...]) -> sympy.Expr:
        """Those of the inner encoding; the rotation is made again from its seed."""
        return self.inner.stored_bits(shape)

    def table_bits(self, shape: tuple[Any, ...]) -> sympy.Expr:
        """Those of the inner encoding."""
        return self.inner.table_bits(shape)

    def expr(self, shape: tuple[Any, ...]) -> Expr:
        """None: a value depends on its whole row."""
        raise SmeltError(
            f"{self}: a value depends on its whole row; turn what it is multiplied with, and read {self.inner}"
        )

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        """Rows whose length has no Hadamard matrix here, or what the inner encoding refuses."""
        if len(shape) < 2:
            return f"needs a tensor [..., N, K], not {list(shape)}"
        if self.by != "orthogonal" and (shape[-1] < 1 or shape[-1] & (shape[-1] - 1)):
            return f"the last dim, {shape[-1]}, is no power of two; use by: orthogonal"
        reason = self.inner.refuses(shape)
        return f"its inner {self.inner}: {reason}" if reason else None

    def _turned(self, x: torch.Tensor) -> torch.Tensor:
        x = checked(self, x)
        turned: torch.Tensor = x @ self.rotation(x.shape[-1]).to(x.device).mT
        return turned


@functools.lru_cache(maxsize=16)
def _rotation(by: str, seed: int, dim: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    if by == "orthogonal":
        made = torch.linalg.qr(torch.randn(dim, dim, generator=random, dtype=torch.float64))
        turn = made.Q * made.R.diagonal().sign()  # uniform over all rotations and reflections
    else:
        signs = 2 * torch.randint(0, 2, (dim,), generator=random) - 1
        turn = walsh(torch.eye(dim, dtype=torch.float64)) / math.sqrt(dim) * (signs if by == "signs" else 1)
    single: torch.Tensor = turn.float()
    return single
