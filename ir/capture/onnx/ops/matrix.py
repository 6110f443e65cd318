"""Matrix products."""

from __future__ import annotations

import torch
from torch.nn import functional

from ..registry import Tensor, op


@op("MatMul", since=1)
def matmul(a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


@op("Gemm", since=7)
def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    a = a.t() if transA else a
    if alpha == beta == 1.0 and transB and (c is None or (c.dim() == 1 and c.shape[0] == b.shape[0])):
        return functional.linear(a, b, c)
    out = torch.matmul(a, b.t() if transB else b)
    out = out if alpha == 1.0 else out * alpha
    if c is None:
        return out
    return out + (c if beta == 1.0 else c * beta)


@op("Einsum", since=12)
def einsum(*xs: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation.replace(" ", ""), *xs)


@op("Det", since=11)
def det(x: Tensor) -> Tensor:
    return torch.det(x)
