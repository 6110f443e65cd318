"""Arithmetic of unsigned types wider than a byte, which torch can hold but hardly compute: through int64 and back.

Sums, products and bits are the same modulo 2^64. Order and division are not for values of uint64 from 2^63 on, which
are negative as int64: those flip the sign bit, or divide in two steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..registry import Operand, Tensor

UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
_SIGN = -(1 << 63)
Binary = Callable[[Any, Any], Tensor]


def _dtype(a: Operand, b: Operand) -> torch.dtype | None:
    """The unsigned type of the operands, if they have one."""
    dtype = a.dtype if isinstance(a, torch.Tensor) else b.dtype if isinstance(b, torch.Tensor) else None
    return dtype if dtype in UNSIGNED else None


def wide(function: Binary) -> Binary:
    """`function` of two operands, right modulo 2^64, for unsigned types too."""

    @functools.wraps(function)
    def widened(a: Operand, b: Operand) -> Tensor:
        dtype = _dtype(a, b)
        if dtype is None:
            return function(a, b)
        return function(_int64(a), _int64(b)).to(dtype)

    return widened


def _int64(x: Operand) -> Operand:
    if isinstance(x, torch.Tensor):
        return x.to(torch.int64)
    return x - (1 << 64) if x >= 1 << 63 else x


def ordered(function: Binary) -> Binary:
    """`function` of two operands that compares them or picks one."""

    @functools.wraps(function)
    def compared(a: Operand, b: Operand) -> Tensor:
        dtype = _dtype(a, b)
        if dtype is None:
            return function(a, b)
        flip = dtype is torch.uint64
        result = function(in_order(a, flip), in_order(b, flip))
        return result if result.dtype is torch.bool else out_of_order(result, dtype)

    return compared


def in_order(x: Operand, flip: bool) -> Operand:
    """int64 in the order of unsigned values; `flip` for uint64."""
    if isinstance(x, torch.Tensor):
        return x.to(torch.int64) ^ _SIGN if flip else x.to(torch.int64)
    return x + _SIGN if flip else x


def out_of_order(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What `in_order` made, as unsigned values again."""
    return (x ^ _SIGN if dtype is torch.uint64 else x).to(dtype)


def divided(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Quotient towards zero and what is left, of unsigned tensors."""
    x, y = a.to(torch.int64), b.to(torch.int64)
    if a.dtype is not torch.uint64:
        quotient = torch.div(x, y, rounding_mode="trunc")
        return quotient.to(a.dtype), (x - quotient * y).to(a.dtype)
    # halves fit into int64; twice their quotient is right or one too small, and a divisor from 2^63 on fits once or not
    half = (x >> 1) & ~_SIGN
    quotient = torch.where(y > 0, torch.div(half, torch.where(y > 0, y, 1), rounding_mode="trunc") << 1, 0)
    left = x - quotient * y
    again = (left ^ _SIGN) >= (y ^ _SIGN)
    return (quotient + again).to(a.dtype), (left - again * y).to(a.dtype)
