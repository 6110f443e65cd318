"""Tile expressions: small immutable trees that say how one element of an encoded tensor is computed from its parts.

An expression gives the value at row `n`, column `k` of a logical `[N, K]` slice. Leaves read the parts by a flat
element index into the part's own slice; index arithmetic is sympy, so that codegen can prove which loads are contiguous
over a vector, which are constant over a group, and which divisions vanish. Trees are typed strictly: both sides of an
operation have one dtype, conversions are written out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import sympy

Op: TypeAlias = Literal["add", "sub", "mul", "and", "shr"]

n = sympy.Symbol("n", integer=True, nonnegative=True)  # row of the logical slice
k = sympy.Symbol("k", integer=True, nonnegative=True)  # column of the logical slice
slot = sympy.Symbol("slot", integer=True, nonnegative=True)  # entry of a `Scatter`, bound by it


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


@dataclass(frozen=True)
class Scatter:
    """Few entries, listed: the sum of `value` over the slots 0 .. `count` - 1 whose `index` is `place`.

    `place` is the column, in lists of a row, or the row, in lists of a column; `index` (int32) and `value` are
    expressions over the other and `slot`.
    """

    index: Expr
    value: Expr
    count: int
    place: sympy.Expr = k

    def __post_init__(self) -> None:
        if self.index.dtype != "int32":
            raise TypeError(f"a place is an int32, not {self.index.dtype}")

    @property
    def dtype(self) -> str:
        """The type of the values."""
        return self.value.dtype

    @property
    def entries(self) -> list[tuple[Expr, Expr]]:
        """(index, value) of every slot."""
        each = ({slot: sympy.Integer(j)} for j in range(self.count))
        return [(substitute(self.index, at), substitute(self.value, at)) for at in each]


Expr: TypeAlias = Load | Take | Const | Index | Bin | Cast | Scatter


def number(part: str, index: sympy.Expr | int, dtype: str) -> Expr:
    """A stored floating-point number as float32."""
    load = Load(part, sympy.sympify(index), dtype)
    return load if dtype == "float32" else Cast("float32", load)


def rebuilt(expr: Expr, each: Callable[[Expr], Expr], place: Callable[[sympy.Expr], sympy.Expr]) -> Expr:
    """The node with `each` applied to the expressions in it and `place` to its own index arithmetic."""
    match expr:
        case Load(part, index, dtype):
            return Load(part, place(sympy.sympify(index)), dtype)
        case Index(value, dtype):
            return Index(place(sympy.sympify(value)), dtype)
        case Take(part, size, at, dtype):
            return Take(part, size, each(at), dtype)
        case Bin(op, a, b):
            return Bin(op, each(a), each(b))
        case Cast(dtype, a):
            return Cast(dtype, each(a))
        case Scatter(index, value, count, at):
            return Scatter(each(index), each(value), count, place(sympy.sympify(at)))
        case Const():
            return expr


def substitute(expr: Expr, values: Mapping[sympy.Symbol, sympy.Expr | int]) -> Expr:
    """The expression with index symbols replaced everywhere, all at once."""
    found = {symbol: sympy.sympify(value) for symbol, value in values.items()}

    def replaced(inner: Expr) -> Expr:
        return rebuilt(inner, replaced, lambda index: index.xreplace(found))  # `subs` is 20 times slower

    return replaced(expr)


def renamed(expr: Expr, prefix: str) -> Expr:
    """The expression over parts whose names begin with the prefix: one term of a composite."""
    match expr:
        case Load(part, index, dtype):
            return Load(prefix + part, index, dtype)
        case Take(part, size, at, dtype):
            return Take(prefix + part, size, renamed(at, prefix), dtype)
    return rebuilt(expr, lambda inner: renamed(inner, prefix), lambda index: index)


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
        case Scatter():
            yield sympy.sympify(expr.place)
            for index, entry in expr.entries:
                yield from indices(index)
                yield from indices(entry)


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
        case Scatter():
            for index, entry in expr.entries:
                yield from loads(index)
                yield from loads(entry)


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
        case Scatter(index, value):
            return {**stored(index), **stored(value)}
    return {}
