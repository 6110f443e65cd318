"""Row-wise kernels of a decode step on a GPU, in Triton: norm with residual add, rotary with cache append.

Arithmetic is float32, results are rounded to the type of their tensor. A row's result does not depend on other rows.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from ..ir.errors import SmeltError
from .product_triton import POINTERS
from .triton_module import load

WIDEST = 1 << 16  # columns of a norm: a row lies in the registers of one program


def norm_signature(dtype: str = "float32", residual: bool = False, gain: bool = True) -> dict[str, str]:
    """Triton's type of every argument of `rms_norm`, for compiling ahead of time."""
    there = {True: POINTERS[dtype], False: "constexpr"}
    return {
        "x": POINTERS[dtype], "residual": there[residual], "gain": there[gain],
        "total": there[residual], "y": POINTERS[dtype],
        **dict.fromkeys(("K", "x_row", "residual_row", "total_row", "y_row"), "i32"),
        "eps": "fp32", "offset": "fp32", "BLOCK": "constexpr",
    }  # fmt: skip


def rotary_signature(dtype: str = "float32", dense: str = "float32") -> dict[str, str]:
    """Triton's type of every argument of `rotate_append`; `dtype` is that of q, k and v, `dense` that of the tail."""
    return {
        **dict.fromkeys(("q", "k", "v", "q_out"), POINTERS[dtype]),
        **dict.fromkeys(("tail_k", "tail_v"), POINTERS[dense]),
        **{"positions": "*i64", "inv_freq": "*fp32", "counts": "*i32"},
        **dict.fromkeys(_STRIDES, "i32"),
        **dict.fromkeys(("T", "W"), "i32"),
        "scale": "fp32",
        **dict.fromkeys(("HEADS", "GROUPS", "D", "E", "R", "BLOCK"), "constexpr"),
    }


@cache
def kernels() -> Any:
    """The module of both kernels, `rms_norm` and `rotate_append`."""
    return load(SOURCE, "rows")


def norm_constants(columns: int) -> dict[str, int]:
    """The compile-time arguments for rows of so many columns, and the warps."""
    block = _power(columns)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def rms_norm(
    x: torch.Tensor,
    out: torch.Tensor,
    gain: torch.Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    residual: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
) -> None:
    """out = t / sqrt(mean(t²) + eps) · (gain + offset) with t = x, or t = x + residual, which is written to `total`.

    All [M, K], rows may lie apart; total may be x or residual. Raises SmeltError for operands that do not fit.
    """
    (m, columns), given = x.shape, [each for each in (x, out, residual, total) if each is not None]
    if columns > WIDEST or any(each.shape != x.shape or each.stride(1) != 1 for each in given):
        shapes = ", ".join(str(list(each.shape)) for each in given)
        raise SmeltError(
            f"rms_norm: x, out, residual and total must have one shape [M, K], contiguous rows and at most {WIDEST} "
            f"columns, not {shapes}"
        )
    if (residual is None) != (total is None):
        raise SmeltError("rms_norm: a residual and the total that it makes come together")
    rows = [0 if each is None else each.stride(0) for each in (x, residual, total, out)]
    kernels().rms_norm[(m,)](
        x, residual, gain, total, out, columns, *rows, float(eps), float(offset), **norm_constants(columns)
    )


def rotate_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    tail_k: torch.Tensor,
    tail_v: torch.Tensor,
    positions: torch.Tensor,
    counts: torch.Tensor,
    inv_freq: torch.Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """out = rotary(q); tail_k and tail_v get rotary(k) and v of the step's tokens, behind each row's tail.

    q, out [B, H, T, D], k [B, G, T, D], v [B, G, T, E], any strides but the last; positions int64 [B, T] contiguous.
    tail_k [B, G, W, D], tail_v [B, G, W, E] contiguous. counts int32 [B, 4]: column 2 is where a row's first new token
    goes. inv_freq float32 [R]: the first 2 R dims are rotated as `smelt::rotary` does; without it nothing is.
    """
    (b, heads, new, dim), groups, value_dim = q.shape, k.shape[1], v.shape[3]
    if tail_k.shape[:2] != (b, groups) or not (tail_k.is_contiguous() and tail_v.is_contiguous()):
        raise SmeltError(
            f"rotate_append: the tail must be contiguous [{b}, {groups}, W, D], not {list(tail_k.shape)} with strides "
            f"{tail_k.stride()}"
        )
    if any(each.stride(3) != 1 for each in (q, k, v, out)) or not positions.is_contiguous():
        raise SmeltError("rotate_append: the channels of q, k, v and out, and the positions, must be contiguous")
    rotated = 0 if inv_freq is None else inv_freq.shape[0]
    if 2 * rotated > dim:
        raise SmeltError(f"rotate_append: {rotated} frequencies rotate {2 * rotated} channels, but a head has {dim}")
    strides = [step for each in (q, k, v, out) for step in each.stride()[:3]]
    kernels().rotate_append[(b * new, heads + 2 * groups)](
        q, k, v, out, tail_k, tail_v, positions, inv_freq, counts, *strides, new, tail_k.shape[2], float(scale),
        **rotary_constants(heads, groups, dim, value_dim, rotated),
    )  # fmt: skip


def rotary_constants(heads: int, groups: int, dim: int, value_dim: int, rotated: int) -> dict[str, int]:
    """The compile-time arguments for a site's sizes, and the warps."""
    block = _power(max(dim, value_dim))
    return {
        "HEADS": heads, "GROUPS": groups, "D": dim, "E": value_dim, "R": rotated, "BLOCK": block, "num_warps": 1,
    }  # fmt: skip


def _power(count: int) -> int:
    return max(16, 1 << (count - 1).bit_length())


_STRIDES = tuple(f"{name}_{dim}" for name in ("q", "k", "v", "o") for dim in ("b", "h", "t"))

SOURCE = f'''\
"""Row-wise kernels: rms_norm with a residual, and rotary with the cache append."""

import triton
import triton.language as tl


@triton.jit
def rms_norm(
    x, residual, gain, total, y, K, x_row, residual_row, total_row, y_row, eps, offset, BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    v = tl.load(x + row * x_row + k, mask=k < K, other=0).to(tl.float32)
    if residual is not None:
        v += tl.load(residual + row * residual_row + k, mask=k < K, other=0).to(tl.float32)
        rounded = v.to(total.dtype.element_ty)
        tl.store(total + row * total_row + k, rounded, mask=k < K)
        v = rounded.to(tl.float32)  # the norm reads what the next layer will read
    v *= tl.rsqrt(tl.sum(v * v, axis=0) / K + eps)
    if gain is not None:
        v *= tl.load(gain + k, mask=k < K, other=0).to(tl.float32) + offset
    else:
        v *= 1.0 + offset
    tl.store(y + row * y_row + k, v.to(y.dtype.element_ty), mask=k < K)


@triton.jit
def turn(angle):
    """Cosine and sine: the angle less multiples of pi / 2, then Taylor series; to 2e-7 for angles below 4 million.

    Triton's own take a path through local memory for large angles.
    """
    turns = (angle * 0.63661977236758134 + 12582912.0) - 12582912.0  # adding 1.5 * 2^23 rounds to an integer
    r = tl.fma(-turns, 1.5703125, angle)  # the first part of pi / 2 has eight bits: exact without fused products too
    r = tl.fma(-turns, 4.83826794897e-4, r)
    z = r * r
    c = 1 - z * (1 / 2 - z * (1 / 24 - z * (1 / 720 - z * (1 / 40320))))
    s = r - r * z * (1 / 6 - z * (1 / 120 - z * (1 / 5040 - z * (1 / 362880))))
    quarter = turns.to(tl.int32) & 3
    odd = (quarter & 1) != 0
    cosine = tl.where(odd, s, c)
    sine = tl.where(odd, c, s)
    return tl.where((quarter == 1) | (quarter == 2), -cosine, cosine), tl.where(quarter >= 2, -sine, sine)


@triton.jit
def rotate(x, positions, inv_freq, at, e, scale, D: tl.constexpr, R: tl.constexpr):
    """A head's vector, its first 2 R channels rotated; channel e < R goes with channel e + R."""
    v = tl.load(x + e, mask=e < D, other=0).to(tl.float32)
    if R > 0:
        other = tl.load(x + tl.where(e < R, e + R, e - R), mask=e < 2 * R, other=0).to(tl.float32)
        freq = tl.load(inv_freq + tl.where(e < R, e, e - R), mask=e < 2 * R, other=0)
        cosine, sine = turn(tl.load(positions + at).to(tl.float32) * freq)
        turned = v * (cosine * scale) + tl.where(e < R, -other, other) * (sine * scale)
        v = tl.where(e < 2 * R, turned, v)
    return v


@triton.jit
def rotate_append(
    q, k, v, q_out, tail_k, tail_v, positions, inv_freq, counts,
    {", ".join(_STRIDES)},
    T, W, scale, HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, t = at // T, at % T
    e = tl.arange(0, BLOCK)
    if head < HEADS:
        turned = rotate(q + b * q_b + head * q_h + t * q_t, positions, inv_freq, at, e, scale, D, R)
        place = q_out + b * o_b + head * o_h + t * o_t + e
        tl.store(place, turned.to(q_out.dtype.element_ty), mask=e < D)
    else:
        g = (head - HEADS) % GROUPS
        slot = (b * GROUPS + g) * W + tl.load(counts + 4 * b + 2) + t
        if head < HEADS + GROUPS:
            turned = rotate(k + b * k_b + g * k_h + t * k_t, positions, inv_freq, at, e, scale, D, R)
            tl.store(tail_k + slot * D + e, turned.to(tail_k.dtype.element_ty), mask=e < D)
        else:
            value = tl.load(v + b * v_b + g * v_h + t * v_t + e, mask=e < E, other=0)
            tl.store(tail_v + slot * E + e, value.to(tail_v.dtype.element_ty), mask=e < E)
'''
