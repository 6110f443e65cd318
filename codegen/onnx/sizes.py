"""Shapes in the graph: sizes are int64 vectors of one element; only those that depend on inputs become nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy

from .builder import Builder, Operand, Value


def size_of(builder: Builder, value: Operand, dim: int) -> str:
    """The size of one dim, [1]."""
    return str(builder.op("Shape", value, start=dim, end=dim + 1 or None))


def shape(builder: Builder, parts: Sequence[int | Value | str]) -> str:
    """A shape from ints and sizes, [n]."""
    if all(isinstance(part, int) for part in parts):
        return builder.const([int(part) for part in parts])  # type: ignore[arg-type]  # all are ints
    return str(builder.op("Concat", *[builder.const([p]) if isinstance(p, int) else p for p in parts], axis=0))


def reshaped(builder: Builder, x: Value, asked: Sequence[int | Value], wanted: tuple[Any, ...]) -> str:
    """`x` in the shape `wanted` (ints and symbols), as constant as may be.

    A size that stands where it stood is copied (0), one more is inferred (-1); only what is left is computed.
    """
    assert x.shape is not None
    spec: list[int | Value] = []
    for at, (size, given) in enumerate(zip(wanted, asked, strict=True)):
        if isinstance(size, int):
            spec.append(size)
        elif at < len(x.shape) and sympy.expand(sympy.sympify(x.shape[at]) - size) == 0:
            spec.append(0)
        elif -1 not in spec:
            spec.append(-1)
        else:
            spec.append(given)
    if 0 in [size for size in wanted if isinstance(size, int)]:
        return str(builder.op("Reshape", x, shape(builder, list(asked)), allowzero=1))
    return str(builder.op("Reshape", x, shape(builder, spec)))
