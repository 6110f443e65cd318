"""QuantizeLinear and DequantizeLinear: one scale for all, for each place of an axis, or for each block along it."""

from __future__ import annotations

import torch
from onnx import TensorProto

from ....errors import SmeltError
from ..kinds import RANGES, marked
from ..registry import Kind, Tensor, op
from .casting import cast, kind_like

_RANGES = {
    **RANGES,
    TensorProto.UINT8: (0, 255),
    TensorProto.INT8: (-128, 127),
    TensorProto.UINT16: (0, 65535),
    TensorProto.INT16: (-32768, 32767),
}
_BYTE = Kind(TensorProto.UINT8, torch.uint8)


def spread(v: Tensor, x: Tensor, axis: int, block_size: int) -> Tensor:
    """A scale or zero point in a shape that broadcasts with x."""
    if v.numel() == 1 and v.dim() <= 1:
        return v.reshape(())
    if block_size:
        return v.repeat_interleave(block_size, axis).narrow(axis, 0, x.shape[axis])
    if v.dim() != 1:
        raise SmeltError(
            f"a scale of shape {list(v.shape)} needs a block_size; without it there is one for all or an axis"
        )
    return v.reshape([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])


@op("DequantizeLinear", since=10)
def dequantize_linear(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: Kind | None = None,
) -> Tensor:
    """(x - zero) scale."""
    wide = x.to(torch.float32)
    if zero is not None:
        wide = wide - spread(zero.to(torch.float32), x, axis, block_size)
    out = wide * spread(scale.to(torch.float32), x, axis, block_size)
    return out.to(scale.dtype if output_dtype is None else output_dtype.dtype)


@op("QuantizeLinear", since=10)
def quantize_linear(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: Kind | None = None,
    precision: Kind | None = None,
    saturate: int = 1,
) -> Tensor:
    """x / scale + zero, to the nearest even, within the range of the type of `zero`."""
    to = kind_like(zero) if zero is not None else output_dtype or _BYTE
    wide = precision.dtype if precision is not None else torch.promote_types(x.dtype, scale.dtype)
    ratio = x.to(wide) / spread(scale, x, axis, block_size).to(wide)
    if to.number not in _RANGES:
        return cast(ratio, to=to, saturate=saturate)
    low, high = _RANGES[to.number]
    whole = torch.round(ratio.double())
    if zero is not None:
        whole = whole + spread(zero.double(), x, axis, block_size)
    return marked(whole.clamp(low, high).to(torch.int32).to(to.dtype), to.number)
