"""Ops that move, pick and arrange elements, and those that tell sizes."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional

from ..known import MOST, Known
from ..registry import DType, Ints, Number, Operand, Tensor, Value, op

aten = torch.ops.aten


@op("Constant")
def constant(
    *,
    value: Value = None,
    value_int: Value = None,
    value_ints: Value = None,
    value_float: Value = None,
    value_floats: Value = None,
) -> Value:
    if value is not None:
        return value
    if value_int is not None or value_ints is not None:
        return Known.of(value_int if value_int is not None else list(value_ints))
    return Known.of(value_float if value_float is not None else list(value_floats), torch.float32)


@op("Shape")
def shape(x: Value, *, start: int = 0, end: int | None = None) -> Known:
    return Known.of(list(x.shape)[start:end])


@op("Size")
def size(x: Tensor) -> Known:
    return Known.of(math.prod(x.shape))


@op("Reshape", since=5)
def reshape(x: Tensor, to: Ints, *, allowzero: int = 0) -> Tensor:
    sizes: list[Any] = [x.shape[i] if not allowzero and _is(d, 0) else d for i, d in enumerate(to)]
    return torch.reshape(x, sizes)


def _is(size: Any, number: int) -> bool:
    """A size is this number for sure; asking a symbol must not tie it down."""
    return isinstance(size, int) and size == number


@op("Flatten")
def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    axis += x.dim() if axis < 0 else 0
    if axis == 1 and x.dim() > 1:
        return torch.flatten(x, 1)
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@op("Transpose")
def transpose(x: Tensor, *, perm: Ints | None = None) -> Tensor:
    order = list(perm) if perm is not None else list(reversed(range(x.dim())))
    moved = [i for i, axis in enumerate(order) if i != axis]
    if len(moved) == 2:
        return x.transpose(*moved)  # what torch models write, and what raising knows
    return x.permute(order) if moved else x


@op("Squeeze", since=13)
def squeeze(x: Tensor, axes: Ints | None = None) -> Tensor:
    if axes is None:
        return torch.squeeze(x)
    for axis in sorted((a % x.dim() for a in axes), reverse=True):
        if not statically_known_true(x.shape[axis] == 1):
            raise ValueError(f"dimension {axis} of {list(x.shape)} is not 1")
        x = x.squeeze(axis)
    return x


@op("Unsqueeze", since=13)
def unsqueeze(x: Tensor, axes: Ints) -> Tensor:
    rank = x.dim() + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = x.unsqueeze(axis)
    return x


@op("Expand")
def expand(x: Tensor, to: Ints) -> Tensor:
    lead = len(to) - x.dim()
    own = [1] * lead + list(x.shape)
    sizes = [*[1] * -lead, *to]
    return x.expand([d if _is(s, 1) else s for d, s in zip(own, sizes, strict=True)])


@op("Tile", since=6)
def tile(x: Tensor, repeats: Ints) -> Tensor:
    return x.repeat(list(repeats))


@op("Concat", since=4)
def concat(*xs: Tensor, axis: int) -> Tensor:
    full = [x for x in xs if not _is(x.shape[axis], 0)] or list(xs[:1])
    last = xs[0].dim() - 1
    return full[0] if len(full) == 1 else torch.cat(full, -1 if axis == last else axis)


@op("Split", since=13)
def split(
    x: Tensor, sizes: Ints | None = None, *, axis: int = 0, num_outputs: int | None = None, outputs: int = 1
) -> tuple[Tensor, ...]:
    if sizes is None:
        count = num_outputs or outputs
        each = -(-x.shape[axis] // count)
        return tuple(torch.split(x, each, axis))
    return tuple(torch.split(x, list(sizes), axis))


@op("Slice", since=10)
def slice_(x: Tensor, starts: Ints, ends: Ints, axes: Ints | None = None, steps: Ints | None = None) -> Tensor:
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis = (i if axes is None else axes[i]) % x.dim()
        step = 1 if steps is None else steps[i]
        if step < 0:
            x = _backwards(x, axis, start, end, step)
            continue
        start = max(start, -sys.maxsize) if isinstance(start, int) else start
        whole = isinstance(start, int) and (start == 0 or start <= -sys.maxsize) and step == 1
        if (
            whole
            and isinstance(end, int)
            and (end >= sys.maxsize or (end == x.shape[axis] and isinstance(x.shape[axis], int)))
        ):
            continue
        x = aten.slice.Tensor(x, axis, start, end, *([step] if step != 1 else []))
    return x


def _backwards(x: Tensor, axis: int, start: int, end: int, step: int) -> Tensor:
    """A slice with a negative step: the same elements forwards, flipped."""
    size = x.shape[axis]
    start = min(start + size if start < 0 else start, size - 1)
    end = max(end + size if end < 0 else end, -1)
    picked = torch.arange(start, end, step) if start > end else torch.arange(0)
    return x.index_select(axis, picked)


@op("Gather", since=1)
def gather(x: Tensor, indices: Value, *, axis: int = 0) -> Tensor:
    axis %= x.dim()
    if isinstance(indices, Known):
        numbers = indices.numbers()
        if not indices.shape:
            return x.select(axis, numbers[0])
        indices = indices.tensor()
    if x.dim() == 2 and axis == 0 and x.is_floating_point():
        return functional.embedding(_counted(indices, x.shape[0]), x)
    indices = torch.where(indices < 0, indices + x.shape[axis], indices)
    picked = x.index_select(axis, indices.reshape(-1).long())
    return picked.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


def _counted(indices: Tensor, size: Any) -> Tensor:
    """Indices may count from the end, which only a run tells; a capture takes them as they are meant for tables."""
    if torch.compiler.is_exporting():
        return indices
    return torch.where(indices < 0, indices + size, indices)


@op("GatherElements", since=11)
def gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    return torch.gather(x, axis, _from_start(indices, x.shape[axis]))


def _from_start(indices: Tensor, size: Any) -> Tensor:
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices)


@op("GatherND", since=11)
def gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    lead = []
    for axis in range(batch_dims):
        view = [1] * (indices.dim() - 1)
        view[axis] = x.shape[axis]
        lead.append(torch.arange(x.shape[axis]).reshape(view))
    parts = [_from_start(p, x.shape[batch_dims + i]) for i, p in enumerate(indices.unbind(-1))]
    return x[(*lead, *parts)]


_REDUCTIONS = {"add": "sum", "mul": "prod", "min": "amin", "max": "amax"}


@op("ScatterElements", since=11)
def scatter_elements(x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none") -> Tensor:
    where = _from_start(indices, x.shape[axis])
    if reduction == "none":
        return torch.scatter(x, axis, where, updates)
    return torch.scatter_reduce(x, axis, where, updates, _REDUCTIONS[reduction])


@op("ScatterND", since=11)
def scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    parts = tuple(_from_start(p, x.shape[i]) for i, p in enumerate(indices.unbind(-1)))
    if reduction == "none":
        return torch.index_put(x, parts, updates)
    if reduction == "add":
        return torch.index_put(x, parts, updates, accumulate=True)
    flat = torch.zeros(parts[0].shape, dtype=torch.int64)
    for i, part in enumerate(parts):
        flat = flat * x.shape[i] + part
    width = math.prod(x.shape[len(parts) :])
    rows, values = x.reshape(-1, width), updates.reshape(-1, width)
    at = flat.reshape(-1, 1).expand(-1, width)
    return torch.scatter_reduce(rows, 0, at, values, _REDUCTIONS[reduction]).reshape(x.shape)


@op("Range", since=11)
def range_(start: Number, limit: Number, delta: Number) -> Tensor:
    return torch.arange(start, limit, delta) if (start, delta) != (0, 1) else torch.arange(limit)


@op("ConstantOfShape", since=9)
def constant_of_shape(to: Ints, *, value: Value = None) -> Value:
    number, dtype = 0.0, torch.float32
    if value is not None:
        number, dtype = value.numbers()[0] if isinstance(value, Known) else value.item(), value.dtype
    if len(to) == 1 and isinstance(to[0], int) and to[0] <= MOST and not dtype.is_floating_point:
        return Known.of([number] * to[0], dtype)
    if not torch.compiler.is_exporting() and math.prod(to) > 1 << 28:
        raise ValueError(f"a tensor of shape {list(to)} made of one number is refused")
    return torch.full(to, number, dtype=dtype)


@op("EyeLike", since=9)
def eye_like(x: Tensor, *, dtype: DType | None = None, k: int = 0) -> Tensor:
    rows, columns = torch.arange(x.shape[0]), torch.arange(x.shape[1])
    return (columns[None] == rows[:, None] + k).to(dtype or x.dtype)


@op("Trilu", since=14)
def trilu(x: Tensor, k: Number = 0, *, upper: int = 1) -> Tensor:
    return torch.triu(x, int(k)) if upper else torch.tril(x, int(k))


@op("Pad", since=11)
def pad(
    x: Tensor, pads: Ints, value: Operand | None = None, axes: Ints | None = None, *, mode: str = "constant"
) -> Tensor:
    where = [a % x.dim() for a in axes] if axes is not None else list(range(x.dim()))
    amounts = [(0, 0)] * x.dim()
    for i, axis in enumerate(where):
        amounts[axis] = (pads[i], pads[i + len(where)])
    if mode == "constant":
        flat = [n for pair in reversed(amounts) for n in pair]
        if not isinstance(value, torch.Tensor):
            return functional.pad(x, flat, value=value or 0)
        inside = functional.pad(torch.ones(x.shape, dtype=torch.bool), flat)
        return torch.where(inside, functional.pad(x, flat), value.reshape(()).to(x.dtype))
    for axis, (before, after) in enumerate(amounts):
        if before or after:
            x = x.index_select(axis, _padded(x.shape[axis], before, after, mode))
    return x


def _padded(size: int, before: int, after: int, mode: str) -> Tensor:
    """Source indices of a padded axis."""
    at = torch.arange(-before, size + after)
    if mode == "edge":
        return at.clamp(0, size - 1)
    if mode == "wrap":
        return at % size
    turn = max(2 * (size - 1), 1)
    at = at.abs() % turn
    return torch.where(at >= size, turn - at, at)


@op("OneHot", since=11)
def one_hot(indices: Tensor, depth: Number, values: Tensor, *, axis: int = -1) -> Tensor:
    count = int(depth)
    where = axis % (indices.dim() + 1)
    view = [1] * (indices.dim() + 1)
    view[where] = count
    at = torch.where(indices < 0, indices + count, indices)
    hot = at.unsqueeze(where) == torch.arange(count).reshape(view)
    return torch.where(hot, values[1], values[0])


@op("DepthToSpace")
def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    b, c, h, w = x.shape
    n = blocksize
    if mode == "DCR":
        return x.reshape(b, n, n, c // n**2, h, w).permute(0, 3, 4, 1, 5, 2).reshape(b, c // n**2, h * n, w * n)
    return x.reshape(b, c // n**2, n, n, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // n**2, h * n, w * n)


@op("SpaceToDepth")
def space_to_depth(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    b, c, h, w = x.shape
    n = blocksize
    order = (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4)
    return x.reshape(b, c, h // n, n, w // n, n).permute(order).reshape(b, c * n**2, h // n, w // n)


@op("NonZero", since=9)
def non_zero(x: Tensor) -> Tensor:
    return torch.nonzero(x).t()


@op("TensorScatter")
def tensor_scatter(
    past: Tensor, update: Tensor, write: Tensor | None = None, *, axis: int = -2, mode: str = "linear"
) -> Tensor:
    axis %= past.dim()
    size, new = past.shape[axis], update.shape[axis]
    start = torch.zeros(past.shape[0], dtype=torch.int64) if write is None else write
    at = start[:, None] + torch.arange(new)
    at = at % size if mode == "circular" else at
    view = [past.shape[0], *[1] * (past.dim() - 1)]
    view[axis] = new
    return torch.scatter(past, axis, at.reshape(view).expand(update.shape), update)
