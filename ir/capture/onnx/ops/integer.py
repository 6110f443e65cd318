"""Products and convolutions of 8-bit integers with zero points: exact, because float64 holds every sum of them."""

from __future__ import annotations

import torch

from ..registry import Ints, Tensor, op
from .network import conv


@op("MatMulInteger")
def matmul_integer(a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None) -> Tensor:
    """(a - a_zero)(b - b_zero) in int32; zero points of a go by row, those of b by column."""
    return torch.matmul(_centred(a, a_zero, by_row=True), _centred(b, b_zero)).to(torch.int32)


def _centred(x: Tensor, zero: Tensor | None, by_row: bool = False) -> Tensor:
    if zero is None:
        return x.double()
    return x.double() - (zero.double()[:, None] if by_row and zero.dim() == 1 else zero.double())


@op("QLinearMatMul")
def qlinear_matmul(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
) -> Tensor:
    """The product of quantized matrices, quantized again."""
    product = torch.matmul(_centred(a, a_zero, by_row=True), _centred(b, b_zero))
    rows = a_scale.double()[:, None] if a_scale.dim() == 1 else a_scale.double()
    return _requantized(product * (rows * b_scale.double() / y_scale.double()), y_zero)


def _requantized(value: Tensor, zero: Tensor) -> Tensor:
    bounds = torch.iinfo(zero.dtype)
    return (torch.round(value) + zero.double()).clamp(bounds.min, bounds.max).to(zero.dtype)


def _by_channel(v: Tensor, rank: int, axis: int) -> Tensor:
    """One value, or one a channel, in a shape that broadcasts along `axis` of a tensor of that rank."""
    return v.double() if v.dim() == 0 else v.double().reshape(-1, *[1] * (rank - 1 - axis))


@op("ConvInteger")
def conv_integer(
    x: Tensor,
    weight: Tensor,
    x_zero: Tensor | None = None,
    weight_zero: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Ints | None = None,
    group: int = 1,
    kernel_shape: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    """Convolution in int32, zero points taken off first."""
    shifted = x.double() if x_zero is None else x.double() - x_zero.double()
    kernel = weight.double() if weight_zero is None else weight.double() - _by_channel(weight_zero, weight.dim(), 0)
    out = conv(shifted, kernel, auto_pad=auto_pad, dilations=dilations, group=group, pads=pads, strides=strides)
    return out.round().to(torch.int32)


@op("QLinearConv")
def qlinear_conv(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Ints | None = None,
    group: int = 1,
    kernel_shape: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    """Convolution of quantized tensors, quantized again; the bias counts in x_scale · weight_scale."""
    kernel = weight.double() - _by_channel(weight_zero, weight.dim(), 0)
    out = conv(
        x.double() - x_zero.double(),
        kernel,
        None if bias is None else bias.double(),
        auto_pad=auto_pad,
        dilations=dilations,
        group=group,
        pads=pads,
        strides=strides,
    ).round()  # torch may add in another order, but all of it is whole numbers
    scale = x_scale.double() * weight_scale.double() / y_scale.double()
    return _requantized(out * _by_channel(scale, x.dim(), 1), y_zero)


@op("DynamicQuantizeLinear")
def dynamic_quantize_linear(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x as uint8 with the scale and zero point that fit its own range, zero included."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    zero = torch.round((-low / scale).clamp(0, 255))
    return (torch.round(x / scale) + zero).clamp(0, 255).to(torch.uint8), scale, zero.to(torch.uint8)
