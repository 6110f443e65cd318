"""Small tensors whose elements are numbers while a graph is traced: shapes, indices and what is computed from them.

Elements are Python or symbolic ints, floats and bools. They are computed here with numpy, whose object arrays hold
symbols too, so that what ends as a size, an axis or an index never becomes a tensor of the graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

MOST = 64  # elements
Array = Any  # a numpy array of numbers, or of objects where some are symbolic


@dataclass(frozen=True, eq=False)
class Known:
    """A tensor of at most MOST elements that is known; `name` is that of the stored tensor it comes from, if any."""

    array: Array
    dtype: torch.dtype
    name: str | None = None

    @classmethod
    def of(cls, values: Any, dtype: torch.dtype = torch.int64) -> Known:
        """From nested sequences of numbers."""
        held = np.array(values, dtype=object) if isinstance(values, list | tuple) else _held(values)
        if is_symbolic(held):
            return cls(held, dtype)
        return cls(held.astype(numpy_type(dtype)), dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Plain sizes: a known tensor has a known shape."""
        return tuple(self.array.shape)

    def numbers(self) -> list[Any]:
        """All elements in order, as Python or symbolic numbers."""
        return [v.item() if isinstance(v, np.generic) else v for v in self.array.reshape(-1)]

    def tensor(self) -> torch.Tensor:
        """As a tensor of the graph."""
        numbers = self.numbers()
        if not (is_symbolic(self.array) or torch.compiler.is_exporting()):
            return torch.tensor(numbers, dtype=self.dtype).reshape(self.shape)
        # torch.tensor would be traced as a constant that is written to, and such graphs are traced twice
        cells = [torch.scalar_tensor(value, dtype=self.dtype) for value in numbers]
        if not self.shape:
            return cells[0]
        made = torch.stack(cells) if cells else torch.empty(0, dtype=self.dtype)
        return made.reshape(self.shape) if len(self.shape) > 1 else made


def as_tensor(value: Any) -> Any:
    """A tensor of the graph for what is known; everything else as it is."""
    return value.tensor() if isinstance(value, Known) else value


def numpy_type(dtype: torch.dtype) -> Any:
    """The numpy type of the same name."""
    return np.dtype(str(dtype).removeprefix("torch."))


def has_numpy_type(dtype: torch.dtype) -> bool:
    """Whether numpy can compute in this type."""
    return dtype is not torch.bfloat16 and "float8" not in str(dtype) and not dtype.is_complex


def is_symbolic(array: Array) -> bool:
    """Whether some element is a symbol."""
    return array.dtype == object and any(
        isinstance(v, torch.SymInt | torch.SymFloat | torch.SymBool) for v in array.reshape(-1)
    )


def compute(op: str, inputs: Sequence[Known | None], attributes: dict[str, Any]) -> tuple[Known, ...] | None:
    """The results of an op of the standard domain over known tensors, or None if it has to be done with tensors."""
    rule = RULES.get(op)
    if rule is None or (op in CONCRETE and any(k is not None and is_symbolic(k.array) for k in inputs)):
        return None
    arrays = [None if k is None else k.array for k in inputs]
    try:
        found = rule(*arrays, **attributes)
    except (TypeError, NotImplementedError):  # numpy has no word for these symbols, or the rule none for an attribute
        return None
    first = next(k.dtype for k in inputs if k is not None)
    typed = inputs[1] if op == "Where" and inputs[1] is not None else None
    made = [_held(array) for array in (found if isinstance(found, list) else [found])]
    if any(a.size > MOST for a in made):
        return None
    return tuple(_typed(a, op, typed.dtype if typed is not None else first) for a in made)


def _typed(array: Array, op: str, dtype: torch.dtype) -> Known:
    if op in _TRUTHS:
        dtype = torch.bool
    elif op == "Shape" or op == "Size":
        dtype = torch.int64
    return Known(array, dtype) if is_symbolic(array) else Known(array.astype(numpy_type(dtype)), dtype)


def _held(value: Any) -> Array:
    """An array; numpy gives a bare number where an array of objects has no axes."""
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value)
    cell = np.empty((), dtype=object)
    cell[()] = value
    return cell


def cast(known: Known, dtype: torch.dtype) -> Known | None:
    """Another type; None where symbols have no such conversion."""
    if not has_numpy_type(dtype) or not is_symbolic(known.array):
        return Known(known.array.astype(numpy_type(dtype)), dtype) if has_numpy_type(dtype) else None
    if dtype.is_floating_point and not known.dtype.is_floating_point:
        return Known(_each(torch.sym_float, known.array), dtype)
    if dtype.is_floating_point == known.dtype.is_floating_point and dtype is not torch.bool:
        return Known(known.array, dtype)
    if not dtype.is_floating_point and dtype is not torch.bool and known.dtype.is_floating_point:
        return Known(_each(math.trunc, known.array), dtype)
    return None


def _each(function: Callable[..., Any], *arrays: Array) -> Array:
    """An elementwise function over broadcast arrays of objects."""
    spread = np.broadcast_arrays(*arrays)
    out = np.empty(spread[0].shape, dtype=object)
    for at in np.ndindex(out.shape):
        out[at] = function(*(a[at].item() if isinstance(a[at], np.generic) else a[at] for a in spread))
    return out


def _divide(a: Array, b: Array) -> Array:
    if a.dtype == object or b.dtype == object:
        is_float = any(isinstance(v, float | torch.SymFloat) for v in (*a.reshape(-1), *b.reshape(-1)))
        return _each((lambda x, y: x / y) if is_float else (lambda x, y: x // y), a, b)  # sizes are not negative
    if a.dtype.kind == "f":
        return a / b
    return (np.abs(a) // np.abs(b)) * np.sign(a) * np.sign(b)


def _extreme(name: str) -> Callable[..., Array]:
    symbolic, plain = getattr(torch, f"sym_{name}"), getattr(np, f"{name}imum")

    def rule(*arrays: Array) -> Array:
        out = arrays[0]
        for array in arrays[1:]:
            out = _each(symbolic, out, array) if object in (out.dtype, array.dtype) else plain(out, array)
        return out

    return rule


def _compare(function: Callable[[Any, Any], Any]) -> Callable[..., Array]:
    return lambda a, b: np.asarray(_each(lambda x, y: bool(function(x, y)), a, b), bool)


def _axes(given: Array | None, attribute: Any) -> tuple[int, ...] | None:
    chosen = attribute if given is None else given.reshape(-1).tolist()
    return None if chosen is None else tuple(int(a) for a in chosen)


def _unsqueeze(a: Array, given: Array | None = None, axes: Any = None) -> Array:
    return np.expand_dims(a, _axes(given, axes) or ())


def _squeeze(a: Array, given: Array | None = None, axes: Any = None) -> Array:
    return np.squeeze(a, _axes(given, axes))


def _slice(a: Array, starts: Array, ends: Array, axes: Array | None = None, steps: Array | None = None) -> Array:
    where = range(len(starts)) if axes is None else axes.tolist()
    by = [1] * len(starts) if steps is None else steps.tolist()
    index: list[Any] = [slice(None)] * a.ndim
    for axis, start, end, step in zip(where, starts.tolist(), ends.tolist(), by, strict=True):
        if isinstance(start, torch.SymInt) or isinstance(end, torch.SymInt):
            raise NotImplementedError
        end = None if step < 0 and end < -a.shape[axis] else end
        index[axis] = slice(start, end, step)
    return a[tuple(index)]


def _gather(a: Array, indices: Array, axis: int = 0) -> Array:
    if is_symbolic(indices):
        raise NotImplementedError
    return np.take(a, indices.astype(np.int64), axis=axis)


def _reshape(a: Array, shape: Array, allowzero: int = 0) -> Array:
    if is_symbolic(shape):
        raise NotImplementedError
    sizes = [a.shape[i] if d == 0 and not allowzero else int(d) for i, d in enumerate(shape.tolist())]
    return a.reshape(sizes)


def _expand(a: Array, shape: Array) -> Array:
    if is_symbolic(shape) or math.prod(map(int, shape)) > MOST:
        raise NotImplementedError
    return np.broadcast_to(a, np.broadcast_shapes(a.shape, tuple(int(d) for d in shape)))


def _tile(a: Array, repeats: Array) -> Array:
    if a.size * math.prod(map(int, repeats)) > MOST:
        raise NotImplementedError
    return np.tile(a, repeats.tolist())


def _reduce(ufunc: Any) -> Callable[..., Array]:
    def rule(
        a: Array, given: Array | None = None, axes: Any = None, keepdims: int = 1, noop_with_empty_axes: int = 0
    ) -> Array:
        where = _axes(given, axes) or None
        if where is None and noop_with_empty_axes:
            return a
        return np.asarray(ufunc.reduce(a, axis=where, keepdims=bool(keepdims)))

    return rule


def _split(a: Array, sizes: Array | None = None, axis: int = 0, num_outputs: int | None = None) -> list[Array]:
    if sizes is None:
        raise NotImplementedError
    return np.split(a, np.cumsum(sizes.astype(np.int64))[:-1], axis)


def _where(condition: Array, a: Array, b: Array) -> Array:
    if is_symbolic(condition):
        raise NotImplementedError
    return np.where(condition.astype(bool), a, b)


def _range(start: Array, limit: Array, delta: Array) -> Array:
    if is_symbolic(start) or is_symbolic(limit) or is_symbolic(delta) or abs((limit - start) / delta) > MOST:
        raise NotImplementedError
    return np.arange(start, limit, delta)


def _scatter_nd(data: Array, indices: Array, updates: Array, reduction: str = "none") -> Array:
    if reduction != "none" or data.ndim != 1:
        raise NotImplementedError
    out = data.copy() if updates.dtype != object else data.astype(object)
    out[indices.reshape(-1).astype(np.int64)] = updates.reshape(-1)
    return out


RULES: dict[str, Callable[..., Any]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": _divide,
    "Mod": lambda a, b, fmod=0: np.fmod(a, b) if fmod else a % b,
    "Neg": lambda a: -a,
    "Abs": np.abs,
    "Sqrt": np.sqrt,
    "Reciprocal": lambda a: 1 / a,
    "Pow": lambda a, b: a**b,
    "Floor": np.floor,
    "Ceil": np.ceil,
    "Relu": lambda a: np.maximum(a, 0),
    "Min": _extreme("min"),
    "Max": _extreme("max"),
    "Equal": _compare(lambda a, b: a == b),
    "Less": _compare(lambda a, b: a < b),
    "LessOrEqual": _compare(lambda a, b: a <= b),
    "Greater": _compare(lambda a, b: a > b),
    "GreaterOrEqual": _compare(lambda a, b: a >= b),
    "Not": np.logical_not,
    "And": np.logical_and,
    "Or": np.logical_or,
    "Identity": lambda a: a,
    "Shape": lambda a, start=0, end=None: np.array(a.shape[start:end], np.int64),
    "Size": lambda a: np.array(a.size, np.int64),
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Concat": lambda *arrays, axis: np.concatenate(arrays, axis),
    "Slice": _slice,
    "Gather": _gather,
    "GatherElements": lambda a, at, axis=0: np.take_along_axis(a, np.where(at < 0, at + a.shape[axis], at), axis),
    "Reshape": _reshape,
    "Flatten": lambda a, axis=1: a.reshape(math.prod(a.shape[: axis % (a.ndim + 1)]), -1),
    "Transpose": lambda a, perm=None: np.transpose(a, perm),
    "Expand": _expand,
    "Tile": _tile,
    "ReduceSum": _reduce(np.add),
    "ReduceProd": _reduce(np.multiply),
    "Split": _split,
    "Where": _where,
    "Range": _range,
    "ScatterND": _scatter_nd,
}
_TRUTHS = {"Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Not", "And", "Or"}
CONCRETE = {"Sqrt", "Reciprocal", "Pow", "Floor", "Ceil", "Relu", "Abs", "Not", "And", "Or", "Tile"}  # not over symbols
