"""The nearest product of two thin matrices: what a tensor, or the error of another encoding, has in common over rows.

GEAR (2024, arXiv 2403.05527) adds one of rank 2 to 4 a head and page to a quantized cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch

from ..errors import SmeltError
from .base import Encoding, Parts, checked, stored_as
from .expr import Bin, Expr, k, n, number, renamed, substitute

SEED = 0


@dataclass(frozen=True)
class LowRank(Encoding):
    """`x = left @ right` with `rank` columns, for each matrix of `[..., N, K]`.

    By `loops` rounds of subspace iteration in float32 from a start that is always the same. Deviation: the paper's code
    makes the basis orthogonal in the last round alone, which loses the weaker directions in float16.

    Parts: `left` float16 `[..., N, rank]` and `right` float16 `[..., rank, K]`. With `factors` these are stored by
    another encoding, `left` as `[..., rank, N]`, in its parts with `left_` and `right_` before their names. Few bits
    will do in a sum whose next term stores what the product misses; `left` is fitted to `right` as it was rounded.
    """

    name: ClassVar[str] = "low_rank"
    rank: int
    loops: int = 3
    factors: Encoding | None = None

    def __post_init__(self) -> None:
        for option in ("rank", "loops"):
            value = getattr(self, option)
            if type(value) is not int or value < 1:
                raise SmeltError(f"low_rank: {option} must be a positive number, not {value!r}")
        held = self.factors
        if held is not None and (not isinstance(held, Encoding) or held.calibrated or held.closes > 1):
            raise SmeltError(
                "low_rank: factors is an encoding of single rows without tables from data, such as "
                f"{{affine: {{bits: 4, group: 0}}}}, not {held}"
            )

    @property
    def closes(self) -> int:
        """Rows that share `right`: as many as the rank, at least."""
        return self.rank

    def encode(self, x: torch.Tensor, tables: Parts | None = None) -> dict[str, torch.Tensor]:
        """The leading directions of x, and its rows in them."""
        x = checked(self, x)
        start = torch.randn(x.shape[-1], self.rank, generator=torch.Generator().manual_seed(SEED)).to(x.device)
        basis = start.expand(*x.shape[:-2], -1, -1)
        size = x.abs().amax((-2, -1), keepdim=True).clamp_min(1e-30)  # squares of large values stay finite
        unit = x / size
        for _ in range(self.loops):
            basis = torch.linalg.qr(unit.mT @ (unit @ basis)).Q
        if self.factors is None:
            right = basis.mT.half().contiguous()
            return {"left": stored_as(self, x @ right.float().mT, "left", "float16"), "right": right}
        return self.onto(x, basis.mT.contiguous())

    def onto(
        self, x: torch.Tensor, right: torch.Tensor, moments: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """The parts for directions [..., rank, K]: rows of x by least squares on the directions as they are stored.

        moments: of what the rows are multiplied with, float64 [K, K], where it is the error of products that counts.
        """
        if self.factors is None:
            made = {"right": stored_as(self, right, "right", "float16").contiguous()}
            held = made["right"].float()
        else:
            made = self.factors.encode(right)
            held = self.factors.decode(made, (*x.shape[:-2], self.rank, x.shape[-1]))
            made = _named("right_", made)
        if moments is None:
            left = torch.linalg.solve(held @ held.mT, held @ x.mT)
        else:
            weighed = held.double() @ moments
            gram = weighed @ held.mT.double()
            gram.diagonal().add_(1e-6 * gram.diagonal().amax() + 1e-30)
            left = torch.linalg.solve(gram, weighed @ x.mT.double()).float()
        if self.factors is None:
            return {"left": stored_as(self, left.mT, "left", "float16").contiguous(), **made}
        return {**_named("left_", self.factors.encode(left)), **made}

    def decode(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The product in float32, then `dtype`."""
        if self.factors is None:
            return (parts["left"].float() @ parts["right"].float()).to(dtype)
        left, right = (
            self.factors.decode(_of(parts, side), (*shape[:-2], self.rank, length))
            for side, length in (("left_", shape[-2]), ("right_", shape[-1]))
        )
        return (left.mT @ right).to(dtype)

    def stored_bits(self, shape: tuple[Any, ...]) -> sympy.Expr:
        """Both factors."""
        if self.factors is None:
            return sympy.expand(16 * self.rank * sympy.prod(shape[:-2]) * (sympy.sympify(shape[-2]) + shape[-1]))
        return sum(self.factors.stored_bits((*shape[:-2], self.rank, length)) for length in shape[-2:])

    def expr(self, shape: tuple[Any, ...]) -> Expr:
        """`left[n, 0] * right[0, k] + left[n, 1] * right[1, k] + …`."""
        total: Expr | None = None
        for i in range(self.rank):
            term = Bin("mul", *self._row(i, shape))
            total = term if total is None else Bin("add", total, term)
        assert total is not None
        return total

    def _row(self, i: int, shape: tuple[Any, ...]) -> tuple[Expr, Expr]:
        """`left[n, i]` and `right[i, k]`."""
        if self.factors is None:
            left, right = n * self.rank + i, i * sympy.sympify(shape[-1]) + k
            return number("left", left, "float16"), number("right", right, "float16")
        if shape[-2] is None:
            raise SmeltError(f"{self}: a factor's place depends on the number of rows, which a page has; leave it out")
        left, right = (self.factors.expr((self.rank, length)) for length in shape[-2:])
        at = sympy.Integer(i)
        return renamed(substitute(left, {n: at, k: n}), "left_"), renamed(substitute(right, {n: at}), "right_")

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        """A rank below 2 of the tensor, matrices that are no larger than their factors, or factors that do not fit."""
        if len(shape) < 2:
            return f"needs a tensor [..., N, K], not {list(shape)}"
        if self.rank > min(shape[-2:]):
            return f"matrices of {shape[-2]} x {shape[-1]} have no rank of {self.rank}"
        if self.factors is None:
            return None
        reasons = (self.factors.refuses((self.rank, length)) for length in shape[-2:])
        return next((f"its factors, {self.factors}: {reason}" for reason in reasons if reason), None)


def _named(prefix: str, parts: Parts) -> dict[str, torch.Tensor]:
    return {prefix + part: value for part, value in parts.items()}


def _of(parts: Parts, prefix: str) -> dict[str, torch.Tensor]:
    return {part.removeprefix(prefix): value for part, value in parts.items() if part.startswith(prefix)}
