"""Reductions, softmax, sorting and running sums."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ..registry import Ints, Number, Tensor, op
from .unsigned import UNSIGNED, in_order, out_of_order


def _reduction(name: str, function: Callable[[Tensor, Any, bool], Tensor]) -> None:
    """Axes are an input from 13 (ReduceSum) or 18 on, an attribute before; none of them means all."""

    def from_input(x: Tensor, axes: Ints | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        if not axes and noop_with_empty_axes:
            return x if name not in _ELEMENTWISE else _ELEMENTWISE[name](x)
        return function(x, list(axes or range(x.dim())), bool(keepdims))

    def from_attribute(x: Tensor, *, axes: Ints | None = None, keepdims: int = 1) -> Tensor:
        return function(x, list(axes or range(x.dim())), bool(keepdims))

    if name == "ReduceSum":
        op(name, since=13)(from_input)
    else:
        op(name, since=1)(from_attribute)
        op(name, since=18)(from_input)


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        return x.mean(axes, keep)
    total = x.sum(axes, keep, dtype=torch.int64)
    return torch.div(total, math.prod(x.shape[axis] for axis in axes), rounding_mode="trunc").to(x.dtype)


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((a % x.dim() for a in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _bound(dtype: torch.dtype, lowest: bool) -> float:
    """What an extreme over nothing is."""
    if dtype.is_floating_point:
        return -math.inf if lowest else math.inf
    return torch.iinfo(dtype).min if lowest else torch.iinfo(dtype).max


def _extreme(name: str) -> Callable[[Tensor, list[int], bool], Tensor]:
    def rule(x: Tensor, axes: list[int], keep: bool) -> Tensor:
        if x.dtype is torch.bool:
            return (rule(x.to(torch.int8), axes, keep) > 0).bool()
        if not math.prod(x.shape[axis] for axis in axes):
            kept = [1 if i in [a % x.dim() for a in axes] else size for i, size in enumerate(x.shape)]
            none = torch.full(kept, _bound(x.dtype, lowest=name == "amax"), dtype=x.dtype)
            return none if keep else none.squeeze(axes)
        made: Tensor = getattr(x, name)(axes, keep)
        return made

    return rule


# what remains of a reduction over no axis
_ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "ReduceL1": torch.abs,
    "ReduceL2": torch.abs,
    "ReduceSumSquare": torch.square,
    "ReduceLogSum": torch.log,
    "ReduceLogSumExp": lambda x: x,
}
for _name, _function in {
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keep, dtype=x.dtype),
    "ReduceMean": _mean,
    "ReduceMax": _extreme("amax"),
    "ReduceMin": _extreme("amin"),
    "ReduceProd": _product,
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keep, dtype=x.dtype),
    "ReduceL2": lambda x, axes, keep: x.square().sum(axes, keep, dtype=x.dtype).sqrt(),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keep, dtype=x.dtype),
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keep),
}.items():
    _reduction(_name, _function)


@op("Softmax", since=13)
def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return torch.softmax(x, axis if axis != x.dim() - 1 else -1)


@op("LogSoftmax", since=13)
def log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return torch.log_softmax(x, axis)


@op("Hardmax", since=13)
def hardmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1)


def _arg(x: Tensor, axis: int, keepdims: int, last: int, largest: bool) -> Tensor:
    if last:
        found = x.flip(axis).argmax(axis, bool(keepdims)) if largest else x.flip(axis).argmin(axis, bool(keepdims))
        return x.shape[axis] - 1 - found
    return x.argmax(axis, bool(keepdims)) if largest else x.argmin(axis, bool(keepdims))


@op("ArgMax", since=12)
def arg_max(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    return _arg(x, axis, keepdims, select_last_index, True)


@op("ArgMin", since=12)
def arg_min(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    return _arg(x, axis, keepdims, select_last_index, False)


@op("CumSum", since=11)
def cumsum(x: Tensor, axis: Number, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    where = int(axis)
    turned = x.flip(where) if reverse else x
    if exclusive:
        turned = torch.cat(
            [torch.zeros_like(x.narrow(where, 0, 1)), turned.narrow(where, 0, x.shape[where] - 1)], where
        )
    summed = turned.cumsum(where, dtype=x.dtype)
    return summed.flip(where) if reverse else summed


@op("CumProd")
def cumprod(x: Tensor, axis: Number, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    where = int(axis)
    turned = x.flip(where) if reverse else x
    if exclusive:
        before = turned.narrow(where, 0, x.shape[where] - 1)
        turned = torch.cat([torch.ones_like(x.narrow(where, 0, 1)), before], where)
    made = turned.cumprod(where, dtype=x.dtype)
    return made.flip(where) if reverse else made


@op("TopK", since=11)
def top_k(x: Tensor, k: Number, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, Tensor]:
    """Of equal ones the first wins; with `sorted` or without, they come in order."""
    keys: Any = in_order(x, x.dtype is torch.uint64) if x.dtype in UNSIGNED else x
    order = torch.sort(keys, dim=axis, descending=bool(largest), stable=True).indices.narrow(axis, 0, int(k))
    values = torch.gather(keys, axis, order)
    return (out_of_order(values, x.dtype) if x.dtype in UNSIGNED else values), order
