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
from .expr import Bin, Expr, k, n, number

SEED = 0


@dataclass(frozen=True)
class LowRank(Encoding):
    """`x = left @ right` with `rank` columns, for each matrix of `[..., N, K]`.

    By `loops` rounds of subspace iteration in float32 from a start that is always the same. Deviation: the paper's code
    makes the basis orthogonal in the last round alone, which loses the weaker directions in float16.

    Parts: `left` float16 `[..., N, rank]` and `right` float16 `[..., rank, K]`.
    """

    name: ClassVar[str] = "low_rank"
    rank: int
    loops: int = 3

    def __post_init__(self) -> None:
        for option in ("rank", "loops"):
            value = getattr(self, option)
            if type(value) is not int or value < 1:
                raise SmeltError(f"low_rank: {option} must be a positive number, not {value!r}")

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
        right = basis.mT.half().contiguous()
        return {"left": stored_as(self, x @ right.float().mT, "left", "float16"), "right": right}

    def decode(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The product in float32, then `dtype`."""
        return (parts["left"].float() @ parts["right"].float()).to(dtype)

    def stored_bits(self, shape: tuple[Any, ...]) -> sympy.Expr:
        """Both factors."""
        return sympy.expand(16 * self.rank * sympy.prod(shape[:-2]) * (sympy.sympify(shape[-2]) + shape[-1]))

    def expr(self, shape: tuple[Any, ...]) -> Expr:
        """`left[n, 0] * right[0, k] + left[n, 1] * right[1, k] + …`."""
        columns, total = sympy.sympify(shape[-1]), None
        for i in range(self.rank):
            term = Bin("mul", number("left", n * self.rank + i, "float16"), number("right", i * columns + k, "float16"))
            total = term if total is None else Bin("add", total, term)
        assert total is not None
        return total

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        """A rank below 2 of the tensor, or matrices that are no larger than their factors."""
        if len(shape) < 2:
            return f"needs a tensor [..., N, K], not {list(shape)}"
        if self.rank > min(shape[-2:]):
            return f"matrices of {shape[-2]} x {shape[-1]} have no rank of {self.rank}"
        return None
