"""Layers that put pieces of images together, and convolutions with a memory or with moved taps."""

from __future__ import annotations

import itertools
import math

import torch
from torch.nn import functional

from ....errors import SmeltError
from ..registry import Ints, Tensor, op
from .network import padded, padding


@op("Col2Im")
def col2im(
    x: Tensor,
    image_shape: Ints,
    block_shape: Ints,
    *,
    dilations: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    """Patches [B, C * block, L] added up where they overlap in an image of `image_shape`."""
    rank = len(image_shape)
    steps, gaps = strides or (1,) * rank, dilations or (1,) * rank
    amounts = padding("NOTSET", pads, image_shape, block_shape, steps, gaps)
    size = [n + before + after for n, (before, after) in zip(image_shape, amounts, strict=True)]
    counts = [(n - (k - 1) * d - 1) // s + 1 for n, k, d, s in zip(size, block_shape, gaps, steps, strict=True)]
    places = [
        _flat([tap * gap + at * step for tap, gap, at, step in zip(taps, gaps, spot, steps, strict=True)], size)
        for taps in itertools.product(*map(range, block_shape))
        for spot in itertools.product(*map(range, counts))
    ]
    b, c = x.shape[0], x.shape[1] // math.prod(block_shape)
    out = x.new_zeros(b, c, math.prod(size)).index_add(2, torch.tensor(places), x.reshape(b, c, -1))
    return padded(out.reshape(b, c, *size), [(-before, -after) for before, after in amounts])


def _flat(at: list[int], size: list[int]) -> int:
    place = 0
    for index, length in zip(at, size, strict=True):
        place = place * length + index
    return place


@op("MaxUnpool")
def max_unpool(
    x: Tensor,
    indices: Tensor,
    output_shape: Ints | None = None,
    *,
    kernel_shape: Ints,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    """Values put back where a MaxPool took them from, zero elsewhere."""
    rank = len(kernel_shape)
    steps, cut = strides or (1,) * rank, pads or (0,) * (2 * rank)
    usual = [(x.shape[2 + i] - 1) * steps[i] - cut[i] - cut[rank + i] + kernel_shape[i] for i in range(rank)]
    inferred = [*x.shape[:2], *usual]
    flat = x.new_zeros(math.prod(inferred)).scatter(0, indices.reshape(-1), x.reshape(-1))
    grow = [(0, new - old) for new, old in zip(output_shape or inferred, inferred, strict=True)]
    return padded(flat.reshape(inferred), grow)


@op("CausalConvWithState")
def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, past: Tensor | None = None, *, activation: str = "none"
) -> tuple[Tensor, Tensor]:
    """Each channel of x [B, C, T] convolved with what came before it, and the last k - 1 positions to carry on."""
    keep = weight.shape[-1] - 1
    before = x.new_zeros(x.shape[0], x.shape[1], keep) if past is None else past
    seen = torch.cat([before, x], 2)
    out = functional.conv1d(seen, weight, bias, groups=weight.shape[0])
    if activation in ("silu", "swish"):
        out = functional.silu(out)
    elif activation != "none":
        raise SmeltError(f"CausalConvWithState: no activation {activation!r}; there are none, silu and swish")
    return out, seen.narrow(2, seen.shape[2] - keep, keep)


@op("DeformConv")
def deform_conv(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    dilations: Ints | None = None,
    group: int = 1,
    kernel_shape: Ints | None = None,
    offset_group: int = 1,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    """Convolution whose taps are moved by `offset` and weighed by `mask`; between pixels read bilinearly."""
    if x.dim() != 4:
        raise SmeltError(f"DeformConv over {x.dim() - 2} axes cannot be imported; over two it can")
    steps, gaps = strides or (1, 1), dilations or (1, 1)
    (top, _), (left, _) = padding("NOTSET", pads, x.shape[2:], tuple(weight.shape[2:]), steps, gaps)
    b, c, h, w = x.shape
    kh, kw = weight.shape[2:]
    oh, ow = offset.shape[2:]
    moves = offset.reshape(b, offset_group, kh * kw, 2, oh, ow)
    rows = torch.arange(kh).repeat_interleave(kw) * gaps[0]
    columns = torch.arange(kw).repeat(kh) * gaps[1]
    ys = moves[:, :, :, 0] + (torch.arange(oh) * steps[0] - top)[:, None] + rows[:, None, None]
    xs = moves[:, :, :, 1] + (torch.arange(ow) * steps[1] - left) + columns[:, None, None]
    image = x.reshape(b, offset_group, c // offset_group, h * w)
    read = _between(image, ys.reshape(b, offset_group, -1), xs.reshape(b, offset_group, -1), h, w)
    read = read.reshape(b, offset_group, c // offset_group, kh * kw, oh * ow)
    if mask is not None:
        read = read * mask.reshape(b, offset_group, 1, kh * kw, oh * ow)
    pieces = read.reshape(b, group, (c // group) * kh * kw, oh * ow)
    out = torch.matmul(weight.reshape(group, -1, pieces.shape[2]), pieces).reshape(b, -1, oh, ow)
    return out if bias is None else out + bias[:, None, None]


def _between(image: Tensor, ys: Tensor, xs: Tensor, h: int, w: int) -> Tensor:
    """Bilinear values of image [B, G, C, h w] at points [B, G, N]; outside there is zero."""
    total = torch.zeros((), dtype=image.dtype)
    for row, share_y in ((ys.floor(), 1 - (ys - ys.floor())), (ys.floor() + 1, ys - ys.floor())):
        for column, share_x in ((xs.floor(), 1 - (xs - xs.floor())), (xs.floor() + 1, xs - xs.floor())):
            inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
            at = (row.clamp(0, h - 1) * w + column.clamp(0, w - 1)).long()
            values = torch.gather(image, 3, at[:, :, None].expand(-1, -1, image.shape[2], -1))
            total = total + values * (share_y * share_x * inside)[:, :, None].to(image.dtype)
    return total
