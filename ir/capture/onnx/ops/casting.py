"""Casts between ONNX's element types, the narrow ones by their values."""

from __future__ import annotations

import torch
from onnx import TensorProto

from ....errors import SmeltError
from ..kinds import FLOAT8, NARROW, RANGES, kind_of, marked
from ..registry import Kind, Tensor, op
from ..stored import DTYPES

_NUMBERS = {dtype: number for number, dtype in DTYPES.items()}


def kind_like(tensor: Tensor) -> Kind:
    """The element type of a tensor."""
    return Kind(kind_of(tensor) or _NUMBERS[tensor.dtype], tensor.dtype)


@op("Cast", since=6)
def cast(x: Tensor, *, to: Kind, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """x as `to`: towards zero into integers, to the nearest even into floats; float8 saturates when asked to."""
    if x.dtype in FLOAT8.values():
        x = x.float()
    if to.number in RANGES:
        return marked(_wrapped(x, *RANGES[to.number]).to(to.dtype), to.number)
    if to.number == TensorProto.FLOAT4E2M1:
        return marked(float4(x).to(to.dtype), to.number)
    if to.number == TensorProto.FLOAT8E8M0:
        return marked(_exponent(x.float(), round_mode).to(to.dtype), to.number)
    if to.number in FLOAT8:
        return marked(float8(x, FLOAT8[to.number], bool(saturate)).to(to.dtype), to.number)
    made = x.to(to.dtype)
    return made if kind_of(made) is None else made.clone()  # the same tensor, which must not keep its mark


@op("CastLike")
def cast_like(x: Tensor, like: Tensor, *, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """x in the type of `like`."""
    return cast(x, to=kind_like(like), saturate=saturate, round_mode=round_mode)


def _wrapped(x: Tensor, low: int, high: int) -> Tensor:
    """Integers of few bits: what lies outside [low, high] wraps around, as it does in wider types."""
    return torch.remainder(x.to(torch.int32) - low, high - low + 1) + low


def float8(x: Tensor, target: torch.dtype, saturate: bool) -> Tensor:
    """Nearest float8; what is too large becomes the largest value with `saturate`, else NaN or infinity."""
    x, top = x.float(), torch.finfo(target).max
    if saturate:
        return x.clamp(-top, top).to(target)  # NaN stays NaN
    step = _spacing(top)
    beyond = x.abs() >= top + step / 2 if target != torch.float8_e4m3fn else x.abs() > top + step / 2
    over = torch.full_like(x, torch.inf if target == torch.float8_e5m2 else torch.nan)
    return torch.where(beyond, torch.copysign(over, x), x.clamp(-top, top)).to(target)


def _spacing(top: float) -> float:
    """Distance of the largest value from the one below: there are 3 (448, 240) or 2 (57344) bits of fraction."""
    return {448.0: 32.0, 240.0: 16.0, 57344.0: 8192.0}[top]


def float4(x: Tensor) -> Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, ties to even, in float32; NaN becomes -0."""
    x = x.float()
    size = x.abs().clamp(max=6.0)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    near = torch.copysign(torch.round(size / step) * step, x)
    return torch.where(torch.isnan(x), -0.0, near)


def _exponent(x: Tensor, round_mode: str) -> Tensor:
    """Powers of two alone: the exponent of float32, rounded as said."""
    bits = x.contiguous().view(torch.int32)
    exponent, fraction = (bits >> 23) & 0xFF, bits & 0x7FFFFF
    if round_mode not in ("up", "down", "nearest"):
        raise SmeltError(f"Cast: no round_mode {round_mode!r}; there are up, down and nearest")
    limit = {"up": 1, "nearest": 0x400000, "down": 0x800000}[round_mode]
    grown = torch.where((fraction >= limit) & (exponent < 254), exponent + 1, exponent)
    return grown.to(torch.uint8).view(torch.float8_e8m0fnu)


@op("BitCast")
def bit_cast(x: Tensor, *, to: Kind) -> Tensor:
    """The same bits read as another type of the same width."""
    if to.number in RANGES:
        return marked(_wrapped(x, *RANGES[to.number]).to(to.dtype), to.number)
    if x.element_size() != to.dtype.itemsize or kind_of(x) in NARROW:
        raise SmeltError(f"BitCast from {x.dtype} to {to.dtype}: the widths differ")
    return x.contiguous().view(to.dtype)
