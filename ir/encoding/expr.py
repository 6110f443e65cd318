"""Tile expressions: small immutable trees that say how one element of an encoded tensor is computed from its parts.

An expression gives the value at row `n`, column `k` of a logical `[N, K]` slice. Leaves read the parts by a flat
element index into the part's own slice; index arithmetic is sympy, so that codegen can prove which loads are contiguous
over a vector, which are constant over a group, and which divisions vanish. Trees are typed strictly: both sides of an
operation have one dtype, conversions are written out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import sympy

Op: TypeAlias = Literal["add", "sub", "mul", "and", "shr"]

n = sympy.Symbol("n", integer=True, nonnegative=True)  # row of the logical slice
k = sympy.Symbol("k", integer=True, nonnegative=True)  # column of the logical slice


@dataclass(frozen=True)
class Load:
    """The stored element of `part` at a flat `index` into its slice; `dtype` is how it is stored."""

    part: str
    index: sympy.Expr
    dtype: str


@dataclass(frozen=True)
class Take:
    """The entry of a small table `part` (shared by the slice) at a computed int32 `index` in 0 .. `size` - 1."""

    part: str
    size: int
    index: Expr
    dtype: str

    def __post_init__(self) -> None:
        if self.index.dtype != "int32":
            raise TypeError(f"a table is indexed by int32, not {self.index.dtype}")


@dataclass(frozen=True)
class Const:
    """A literal."""

    value: int | float
    dtype: str


@dataclass(frozen=True)
class Index:
    """An index expression as a value of type int32, such as the shift that finds a code in its byte."""

    value: sympy.Expr
    dtype: str = "int32"


@dataclass(frozen=True)
class Bin:
    """`a op b` on operands of one dtype; `and` and `shr` take int32."""

    op: Op
    a: Expr
    b: Expr

    def __post_init__(self) -> None:
        if self.a.dtype != self.b.dtype:
            raise TypeError(f"{self.op} of {self.a.dtype} and {self.b.dtype}: write the conversion out")
        if self.op in ("and", "shr") and self.a.dtype != "int32":
            raise TypeError(f"{self.op} takes int32, not {self.a.dtype}")

    @property
    def dtype(self) -> str:
        """The type of both operands."""
        return self.a.dtype


@dataclass(frozen=True)
class Cast:
    """`a` converted to `dtype`."""

    dtype: str
    a: Expr


Expr: TypeAlias = Load | Take | Const | Index | Bin | Cast


def substitute(expr: Expr, values: Mapping[sympy.Symbol, sympy.Expr | int]) -> Expr:
    """The expression with index symbols replaced everywhere, all at once."""
    match expr:
        case Load(part, index, dtype):
            return Load(part, sympy.sympify(index).subs(values, simultaneous=True), dtype)
        case Index(value, dtype):
            return Index(sympy.sympify(value).subs(values, simultaneous=True), dtype)
        case Take(part, size, at, dtype):
            return Take(part, size, substitute(at, values), dtype)
        case Bin(op, a, b):
            return Bin(op, substitute(a, values), substitute(b, values))
        case Cast(dtype, a):
            return Cast(dtype, substitute(a, values))
        case Const():
            return expr


def indices(expr: Expr) -> Iterator[sympy.Expr]:
    """Every index expression in the tree, left to right."""
    match expr:
        case Load(_, index, _):
            yield sympy.sympify(index)
        case Index(value, _):
            yield sympy.sympify(value)
        case Take(_, _, at, _):
            yield from indices(at)
        case Bin(_, a, b):
            yield from indices(a)
            yield from indices(b)
        case Cast(_, a):
            yield from indices(a)


def loads(expr: Expr) -> Iterator[Load]:
    """Every load in the tree, left to right, those inside of a table's index included."""
    match expr:
        case Load():
            yield expr
        case Take(_, _, at, _):
            yield from loads(at)
        case Bin(_, a, b):
            yield from loads(a)
            yield from loads(b)
        case Cast(_, a):
            yield from loads(a)


def stored(expr: Expr) -> dict[str, str]:
    """The parts that the tree reads and how each is stored, in the order of first use: what a kernel must be given."""
    match expr:
        case Load(part, _, dtype):
            return {part: dtype}
        case Take(part, _, at, dtype):
            return {**stored(at), part: dtype}
        case Bin(_, a, b):
            return {**stored(a), **stored(b)}
        case Cast(_, a):
            return stored(a)
    return {}
