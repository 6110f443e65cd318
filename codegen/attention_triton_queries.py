"""Writes the queries of a step's tokens behind those of the tail, for sites whose scores are computed from them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from .product_triton import POINTERS
from .triton_module import load

SIGNATURE = dict.fromkeys(("q_row", "q_head", "q_token", "H", "T", "W"), "i32")


def append_queries(q: torch.Tensor, tail: torch.Tensor, counts: torch.Tensor) -> None:
    """tail [B, H, W, D] gets q [B, H, T, D] of the step's tokens, from slot counts[:, 2] on; counts int32 [B, 4]."""
    batch, heads, new, dim = q.shape
    if q.stride(3) != 1 or not tail.is_contiguous() or (tail.shape[:2], tail.shape[3]) != ((batch, heads), dim):
        raise ValueError(f"queries {list(q.shape)} do not fit a tail {list(tail.shape)}, contiguous in their channels")
    block = max(16, 1 << (dim - 1).bit_length())
    kernel()[(batch * new, heads)](
        q, tail, counts, *q.stride()[:3], heads, new, tail.shape[2], D=dim, BLOCK=block, num_warps=1
    )


def signature(dtype: str, dense: str) -> dict[str, str]:
    """Triton's type of every argument, for compiling ahead of time; `dtype` is that of q, `dense` that of the tail."""
    at = {"q": POINTERS[dtype], "tail": POINTERS[dense], "counts": "*i32"}
    return {**at, **SIGNATURE, "D": "constexpr", "BLOCK": "constexpr"}


@cache
def kernel() -> Any:
    """The `triton.jit` function."""
    return load(SOURCE, "queries").append


SOURCE = '''\
"""Queries appended to those of a tail."""

import triton
import triton.language as tl


@triton.jit
def append(q, tail, counts, q_row, q_head, q_token, H, T, W, D: tl.constexpr, BLOCK: tl.constexpr):
    at, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, t = at // T, at % T
    e = tl.arange(0, BLOCK)
    value = tl.load(q + b * q_row + h * q_head + t * q_token + e, mask=e < D, other=0)
    slot = (b * H + h) * W + tl.load(counts + 4 * b + 2) + t
    tl.store(tail + slot * D + e, value.to(tail.dtype.element_ty), mask=e < D)
'''
