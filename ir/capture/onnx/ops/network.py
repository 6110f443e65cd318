"""Layers of networks: convolutions, pools and normalisations."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional

from ....errors import SmeltError
from ..known import Known
from ..registry import Ints, Tensor, Value, op

_CONVOLUTIONS: dict[int, Any] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED: dict[int, Any] = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}


def padding(
    auto: str, pads: Ints | None, sizes: Any, kernel: Ints, strides: Ints, dilations: Ints
) -> list[tuple[int, int]]:
    """Zeros before and after each spatial axis."""
    rank = len(kernel)
    if auto in ("NOTSET", ""):
        flat = pads or (0,) * (2 * rank)
        return [(flat[i], flat[i + rank]) for i in range(rank)]
    if auto == "VALID":
        return [(0, 0)] * rank
    found = []
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        half = total // 2
        found.append((half, total - half) if auto == "SAME_UPPER" else (total - half, half))
    return found


def padded(x: Tensor, amounts: list[tuple[int, int]], value: float = 0.0) -> Tensor:
    """`x` with its last axes padded."""
    flat = [n for pair in reversed(amounts) for n in pair]
    return functional.pad(x, flat, value=value) if any(flat) else x


@op("Conv")
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Ints | None = None,
    group: int = 1,
    kernel_shape: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    rank = x.dim() - 2
    stride, dilation = strides or (1,) * rank, dilations or (1,) * rank
    amounts = padding(auto_pad, pads, x.shape[2:], tuple(weight.shape[2:]), stride, dilation)
    convolve = _CONVOLUTIONS[rank]
    if all(before == after for before, after in amounts):
        out: Tensor = convolve(x, weight, bias, stride, [before for before, _ in amounts], dilation, group)
    else:
        out = convolve(padded(x, amounts), weight, bias, stride, 0, dilation, group)
    return out


@op("ConvTranspose")
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Ints | None = None,
    group: int = 1,
    kernel_shape: Ints | None = None,
    output_padding: Ints | None = None,
    output_shape: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    rank = x.dim() - 2
    stride, dilation, extra = strides or (1,) * rank, dilations or (1,) * rank, output_padding or (0,) * rank
    kernel, sizes = tuple(weight.shape[2:]), x.shape[2:]
    full = [stride[i] * (sizes[i] - 1) + (kernel[i] - 1) * dilation[i] + 1 for i in range(rank)]
    out: Tensor = _TRANSPOSED[rank](x, weight, bias, stride, 0, 0, group, dilation)
    wanted = output_shape[-rank:] if output_shape else None
    if wanted is None and auto_pad.startswith("SAME"):
        wanted = tuple(sizes[i] * stride[i] for i in range(rank))
    if wanted is not None:
        total = [full[i] + extra[i] - wanted[i] for i in range(rank)]
        first = [t - t // 2 if auto_pad != "SAME_UPPER" else t // 2 for t in total]
        cut = [(first[i], total[i] - first[i]) for i in range(rank)]
    else:
        cut = padding("NOTSET", pads, sizes, kernel, stride, dilation)
    amounts = [(-before, extra[i] - after) for i, (before, after) in enumerate(cut)]
    grown = padded(out, amounts)
    if bias is None or not any(extra[i] - after > 0 for i, (_, after) in enumerate(cut)):
        return grown
    bare: Tensor = _TRANSPOSED[rank](x, weight, None, stride, 0, 0, group, dilation)
    return padded(bare, amounts) + bias.reshape(-1, *[1] * rank)


def _pool_sizes(
    x: Tensor, kernel: Ints, strides: Ints, dilations: Ints, amounts: list[tuple[int, int]], ceil_mode: int
) -> list[tuple[int, int]]:
    """Padding grown at the end, so that a pool that rounds down gives what ONNX rounds up to."""
    if not ceil_mode:
        return amounts
    grown = []
    for size, k, stride, dilation, (before, after) in zip(
        x.shape[2:], kernel, strides, dilations, amounts, strict=True
    ):
        span = (k - 1) * dilation + 1
        count = -(-(size + before + after - span) // stride) + 1
        if (count - 1) * stride >= size + before:  # the last window would start in the padding behind
            count -= 1
        grown.append((before, max(after, (count - 1) * stride + span - size - before)))
    return grown


_MAX: dict[int, Any] = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}


@op("MaxPool")
def max_pool(
    x: Tensor,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Ints | None = None,
    kernel_shape: Ints,
    pads: Ints | None = None,
    storage_order: int = 0,
    strides: Ints | None = None,
    outputs: int = 1,
) -> Value:
    rank = len(kernel_shape)
    stride, dilation = strides or (1,) * rank, dilations or (1,) * rank
    amounts = padding(auto_pad, pads, x.shape[2:], kernel_shape, stride, dilation)
    if outputs > 1:
        return _max_with_indices(x, kernel_shape, stride, dilation, amounts, ceil_mode, storage_order)
    same = all(b == a and 2 * b <= k for (b, a), k in zip(amounts, kernel_shape, strict=True))
    if same and not ceil_mode and x.is_floating_point():
        return _MAX[rank](x, kernel_shape, stride, [before for before, _ in amounts], dilation)
    grown = _pool_sizes(x, kernel_shape, stride, dilation, amounts, ceil_mode)
    if x.is_floating_point():
        return _MAX[rank](padded(x, grown, -math.inf), kernel_shape, stride, 0, dilation)
    wide = padded(x.float(), grown, -math.inf)  # bytes are exact in float32
    return _MAX[rank](wide, kernel_shape, stride, 0, dilation).to(x.dtype)


def _max_with_indices(
    x: Tensor,
    kernel: Ints,
    strides: Ints,
    dilations: Ints,
    amounts: list[tuple[int, int]],
    ceil_mode: int,
    storage_order: int,
) -> tuple[Tensor, Tensor]:
    """Maxima and where they were, counted over the whole input (column by column with storage_order 1)."""
    grown = _pool_sizes(x, kernel, strides, dilations, amounts, ceil_mode)
    sizes = list(x.shape[2:])
    at = torch.arange(math.prod(sizes)).reshape(sizes)
    if storage_order:
        at = torch.arange(math.prod(sizes)).reshape(list(reversed(sizes))).permute(*reversed(range(len(sizes))))
    at = at + math.prod(sizes) * torch.arange(math.prod(x.shape[:2])).reshape(*x.shape[:2], *[1] * len(sizes))
    windows = _windows(padded(x.double(), grown, -math.inf), kernel, strides, dilations)
    where = _windows(padded(at.double(), grown, -1.0), kernel, strides, dilations)
    best = windows.argmax(-1, keepdim=True)
    return windows.gather(-1, best)[..., 0].to(x.dtype), where.gather(-1, best)[..., 0].long()


def _windows(x: Tensor, kernel: Ints, strides: Ints, dilations: Ints) -> Tensor:
    """`x [B, C, …]` as [B, C, …, window]."""
    rank = len(kernel)
    for axis, (k, stride, dilation) in enumerate(zip(kernel, strides, dilations, strict=True)):
        x = x.unfold(2 + axis, (k - 1) * dilation + 1, stride)[..., ::dilation]
    return x.flatten(2 + rank)


@op("AveragePool")
def average_pool(
    x: Tensor,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Ints | None = None,
    kernel_shape: Ints,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    rank = len(kernel_shape)
    stride, dilation = strides or (1,) * rank, dilations or (1,) * rank
    amounts = padding(auto_pad, pads, x.shape[2:], kernel_shape, stride, dilation)
    grown = _pool_sizes(x, kernel_shape, stride, dilation, amounts, ceil_mode)
    plain = not any(n for pair in grown for n in pair) and set(dilation) == {1} and rank in (1, 2, 3)
    if plain:
        pool: Any = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}[rank]
        out: Tensor = pool(x, kernel_shape, stride)
        return out
    ones = torch.ones_like(x[:1, :1])
    inner = padded(ones, amounts, 1.0) if count_include_pad else padded(ones, amounts)
    rest = [(g0 - a0, g1 - a1) for (g0, g1), (a0, a1) in zip(grown, amounts, strict=True)]
    counts = _windows(padded(inner, rest), kernel_shape, stride, dilation).sum(-1)
    return _windows(padded(x, grown), kernel_shape, stride, dilation).sum(-1) / counts


@op("LpPool", since=2)
def lp_pool(
    x: Tensor,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Ints | None = None,
    kernel_shape: Ints,
    p: int = 2,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    rank = len(kernel_shape)
    stride, dilation = strides or (1,) * rank, dilations or (1,) * rank
    amounts = padding(auto_pad, pads, x.shape[2:], kernel_shape, stride, dilation)
    grown = _pool_sizes(x, kernel_shape, stride, dilation, amounts, ceil_mode)
    return _windows(padded(x, grown).abs().pow(p), kernel_shape, stride, dilation).sum(-1).pow(1 / p)


@op("GlobalAveragePool")
def global_average_pool(x: Tensor) -> Tensor:
    return x.mean(list(range(2, x.dim())), True)


@op("GlobalMaxPool")
def global_max_pool(x: Tensor) -> Tensor:
    return x.amax(list(range(2, x.dim())), True)


@op("GlobalLpPool", since=2)
def global_lp_pool(x: Tensor, *, p: int = 2) -> Tensor:
    return x.abs().pow(p).sum(list(range(2, x.dim())), True).pow(1 / p)


@op("BatchNormalization", since=9)
def batch_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
    spatial: int = 1,
) -> Value:
    if not training_mode:
        return functional.batch_norm(x, mean, variance, scale, bias, False, 0.0, epsilon)
    axes = [0, *range(2, x.dim())]
    now_mean, now_variance = x.mean(axes), x.var(axes, unbiased=False)
    out = functional.batch_norm(x, now_mean, now_variance, scale, bias, False, 0.0, epsilon)
    kept = mean * momentum + now_mean * (1 - momentum), variance * momentum + now_variance * (1 - momentum)
    return out, *kept


@op("LayerNormalization")
def layer_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    outputs: int = 1,
) -> Value:
    axis %= x.dim()
    scale = scale if scale.dim() == x.dim() - axis else scale.expand(x.shape[axis:])
    out = functional.layer_norm(x, list(x.shape[axis:]), scale, bias, epsilon)
    if outputs == 1:
        return out
    axes = list(range(axis, x.dim()))
    mean = x.mean(axes, True)
    return out, mean, torch.rsqrt((x - mean).square().mean(axes, True) + epsilon)


@op("RMSNormalization")
def rms_normalization(
    x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    axis %= x.dim()
    if axis == x.dim() - 1 and scale.dim() == 1:
        return functional.rms_norm(x, list(x.shape[axis:]), scale, epsilon)
    inverse = torch.rsqrt(x.float().square().mean(list(range(axis, x.dim())), True) + epsilon)
    return (x * inverse).to(x.dtype) * scale


@op("InstanceNormalization")
def instance_normalization(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    return functional.instance_norm(x, None, None, scale, bias, True, 0.0, epsilon)


@op("GroupNormalization", since=21)
def group_normalization(
    x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5, num_groups: int, stash_type: int = 1
) -> Tensor:
    return functional.group_norm(x, num_groups, scale, bias, epsilon)


@op("LpNormalization")
def lp_normalization(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    norm = x.norm(p, axis, True)
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


@op("MeanVarianceNormalization")
def mean_variance_normalization(x: Tensor, *, axes: Ints = (0, 2, 3)) -> Tensor:
    mean = x.mean(axes, True)
    deviation = ((x * x).mean(axes, True) - mean * mean).sqrt()
    return (x - mean) / (deviation + 1e-9)


@op("LRN")
def lrn(x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> Tensor:
    before = (size - 1) // 2
    around = functional.pad(x.square(), [0] * (2 * (x.dim() - 2)) + [before, size - 1 - before])
    total = around.unfold(1, size, 1).sum(-1)
    return x / (bias + alpha / size * total).pow(beta)


@op("Dropout", since=12)
def dropout(x: Tensor, ratio: Value = None, training: Value = None, *, seed: int = 0, outputs: int = 1) -> Value:
    """x as it is; what trains would draw random numbers."""
    trains = training is not None and not (isinstance(training, Known) and not training.numbers()[0])
    if trains and not (isinstance(ratio, Known) and ratio.numbers()[0] == 0):
        raise SmeltError("Dropout in training mode draws random numbers, and a graph must not; export in eval mode")
    return (x, torch.ones_like(x, dtype=torch.bool)) if outputs > 1 else x
