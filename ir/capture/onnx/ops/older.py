"""What ops meant before opset 13, where it differs: axes and limits as attributes, softmax over all axes behind one.

Elementwise ops before version 7 broadcast only where told to, the second operand along `axis`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ....errors import SmeltError
from ..registry import Ints, Number, Tensor, Value, op
from . import elementwise, matrix, network, reduce, shape
from .image import upsample


@op("Squeeze")
def squeeze(x: Tensor, *, axes: Ints | None = None) -> Tensor:
    """Axes of size one go."""
    return shape.squeeze(x, axes)


@op("Unsqueeze")
def unsqueeze(x: Tensor, *, axes: Ints) -> Tensor:
    """New axes of size one."""
    return shape.unsqueeze(x, axes)


@op("Split", since=2)
def split(x: Tensor, *, axis: int = 0, split: Ints | None = None, outputs: int = 1) -> tuple[Tensor, ...]:
    """x in parts of the sizes given, or equal ones."""
    return shape.split(x, split, axis=axis, outputs=outputs)


@op("Slice")
def slice_(x: Tensor, *, starts: Ints, ends: Ints, axes: Ints | None = None) -> Tensor:
    """x[start:end] along each of `axes`."""
    return shape.slice_(x, starts, ends, axes)


@op("Pad", since=2)
def pad(x: Tensor, *, pads: Ints, mode: str = "constant", value: float = 0.0) -> Tensor:
    """x grown at both ends of every axis."""
    return shape.pad(x, pads, value, mode=mode)


@op("Reshape")
def reshape(x: Tensor, *, shape: Ints, consumed_inputs: Ints | None = None) -> Tensor:
    """x in another shape: 0 keeps a size, -1 is what is left."""
    return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(shape)])


@op("Clip")
def clip(x: Tensor, *, max: float = math.inf, min: float = -math.inf, consumed_inputs: Ints | None = None) -> Tensor:
    """x within limits."""
    return x.clamp(min, max)


@op("ReduceSum")
def reduce_sum(x: Tensor, *, axes: Ints | None = None, keepdims: int = 1) -> Tensor:
    """The sum over axes."""
    return x.sum(list(axes or range(x.dim())), bool(keepdims), dtype=x.dtype)


@op("TopK")
def top_k(x: Tensor, *, k: int, axis: int = -1) -> tuple[Tensor, Tensor]:
    """The k largest."""
    return reduce.top_k(x, k, axis=axis)


@op("TopK", since=10)
def top_k_10(x: Tensor, k: Number, *, axis: int = -1) -> tuple[Tensor, Tensor]:
    """The k largest."""
    return reduce.top_k(x, k, axis=axis)


def _by_rows(name: str, function: Callable[..., Tensor]) -> None:
    """Axes before `axis` are rows, the others are one long row each."""

    def rule(x: Tensor, *, axis: int = 1) -> Tensor:
        rows = math.prod(x.shape[: axis % x.dim() if axis < 0 else axis])
        return function(x.reshape(rows, -1), axis=1).reshape(x.shape)

    op(name)(rule)


_by_rows("Softmax", reduce.softmax)
_by_rows("LogSoftmax", reduce.log_softmax)
_by_rows("Hardmax", reduce.hardmax)


@op("ArgMax")
def arg_max(x: Tensor, *, axis: int = 0, keepdims: int = 1) -> Tensor:
    """Where the largest value stands."""
    return reduce.arg_max(x, axis=axis, keepdims=keepdims)


@op("ArgMin")
def arg_min(x: Tensor, *, axis: int = 0, keepdims: int = 1) -> Tensor:
    """Where the smallest value stands."""
    return reduce.arg_min(x, axis=axis, keepdims=keepdims)


@op("Dropout")
def dropout(
    x: Tensor, *, ratio: float = 0.5, is_test: int = 1, consumed_inputs: Ints | None = None, outputs: int = 1
) -> Value:
    """x, in a graph that does not train."""
    if not is_test:
        raise SmeltError(
            "Dropout that trains draws random numbers, and a graph must not; export the model in eval mode"
        )
    return (x, torch.ones_like(x, dtype=torch.bool)) if outputs > 1 else x


@op("BatchNormalization")
def batch_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    consumed_inputs: Ints | None = None,
    epsilon: float = 1e-5,
    is_test: int = 0,
    momentum: float = 0.9,
    spatial: int = 1,
    outputs: int = 1,
) -> Tensor:
    """x shifted and scaled by statistics a channel."""
    if not spatial:
        raise SmeltError("BatchNormalization with spatial=0 keeps statistics a pixel, which opset 9 dropped")
    if outputs > 1 and not is_test:
        raise SmeltError("BatchNormalization that trains cannot be imported from opsets before 14")
    made: Tensor = network.batch_normalization(x, scale, bias, mean, variance, epsilon=epsilon)
    return made


@op("BatchNormalization", since=7)
def batch_normalization_7(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    spatial: int = 1,
    outputs: int = 1,
) -> Tensor:
    """x shifted and scaled by statistics a channel; with five outputs it trains."""
    return batch_normalization(x, scale, bias, mean, variance, epsilon=epsilon, spatial=spatial, outputs=outputs)


@op("GroupNormalization", since=18)
def group_normalization(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5, num_groups: int) -> Tensor:
    """Scaled a group instead of a channel."""
    wider = [v.repeat_interleave(x.shape[1] // num_groups) for v in (scale, bias)]
    return network.group_normalization(x, *wider, epsilon=epsilon, num_groups=num_groups)


@op("Upsample", since=7)
def upsample_7(x: Tensor, *, scales: Any, mode: str = "nearest") -> Tensor:
    """x times `scales`."""
    return upsample(x, scales, mode=mode)


@op("Gemm")
def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    broadcast: int = 0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """alpha a b + beta c."""
    return matrix.gemm(a, b, c, alpha=alpha, beta=beta, transA=transA, transB=transB)


@op("PRelu")
def prelu(x: Tensor, slope: Tensor, *, consumed_inputs: Ints | None = None) -> Tensor:
    """One slope for all, or one a channel."""
    wide = slope if slope.numel() == 1 else slope.reshape(-1, *[1] * (x.dim() - 2))
    return elementwise.prelu(x, wide)


def _without_broadcast(name: str, function: Callable[..., Tensor]) -> None:
    def rule(
        a: Tensor, b: Tensor, *, axis: int | None = None, broadcast: int = 0, consumed_inputs: Ints | None = None
    ) -> Tensor:
        if not broadcast and a.shape != b.shape:
            raise SmeltError(f"{name}: shapes {list(a.shape)} and {list(b.shape)} differ, and broadcast is not set")
        if axis is not None and broadcast:
            b = b.reshape(*b.shape, *[1] * (a.dim() - axis % a.dim() - b.dim()))
        return function(a, b)

    op(name)(rule)


for _name, _function in {
    "Add": elementwise.add,
    "Sub": elementwise.sub,
    "Mul": elementwise.mul,
    "Div": elementwise.div,
    "Pow": elementwise.pow_,
    "And": elementwise.and_,
    "Or": elementwise.or_,
    "Xor": elementwise.xor,
    "Equal": elementwise.equal,
    "Less": elementwise.less,
    "Greater": elementwise.greater,
}.items():
    _without_broadcast(_name, _function)


def _same_shapes(name: str, function: Callable[..., Tensor]) -> None:
    def rule(*xs: Tensor, consumed_inputs: Ints | None = None) -> Tensor:
        return function(*xs)

    op(name)(rule)


for _name, _function in {
    "Max": elementwise.max_,
    "Min": elementwise.min_,
    "Sum": elementwise.sum_,
    "Mean": elementwise.mean,
}.items():
    _same_shapes(_name, _function)


@op("Scatter", since=9)
def scatter(x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0) -> Tensor:
    """x with `updates` put at an index along one axis."""
    return shape.scatter_elements(x, indices, updates, axis=axis)
