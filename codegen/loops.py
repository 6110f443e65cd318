"""The inner loops of matrix products: what of an encoding changes along a row, and what is constant over a group.

The tile expression of an encoding, over the interleaved layout, is split into a factor that changes along a row and
coefficients that are constant over a group of columns and leave the loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import sympy

from ..ir.encoding import NM, Encoding
from ..ir.encoding.expr import Bin, Cast, Const, Expr, Index, Take, indices, k, loads, stored, substitute
from . import interleave, planes, walk
from .hoist import folded, span, split
from .interleave import lane
from .printers import cpp
from .ranges import Ranges

K = sympy.Symbol("K", integer=True, positive=True)
group, step, column = sympy.symbols("group step column", integer=True, nonnegative=True)
LENGTHS = (4, 8, 16, 32, 64, 128)  # columns of an unrolled piece of the inner loop
ONE = Const(1.0, "float32")
LANES: Ranges = {lane: (0, interleave.ROWS - 1)}


@dataclass(frozen=True)
class Inner:
    """The loop over one group of columns: the sum of coefficient times factor, and a term without a factor.

    `columns`: of a group, None for the whole row; `length`: of an unrolled piece. `factor` is over `step` and `column`,
    an integer code in 0..255 above `-offset` where the product is one of integers. `walked`: the factor is what a walk
    reads (see `walk`), not the expression that stands for it. `kept`, `of`: columns are the kept ones of N:M sparsity,
    and `places` says which of the neighbours each is.
    """

    columns: int | None
    length: int
    coefficients: tuple[Expr, ...]
    factors: tuple[Expr, ...]
    constant: Expr | None
    offset: int = 0
    walked: bool = False
    kept: int = 1
    of: int = 1
    places: tuple[Expr, ...] = ()

    def at(self, factor: Expr, i: int | sympy.Expr) -> Expr:
        """A factor at column `i` of piece `step`."""
        start = 0 if self.columns == self.length else self.length * step
        return folded(substitute(factor, {column: start + i}), self.ranges)

    @property
    def ranges(self) -> Ranges:
        """Of the symbols of a factor."""
        pieces = {step: (0, self.columns // self.length - 1)} if self.columns else {}
        return {**LANES, **pieces}


def floats(encoding: Encoding) -> Inner | str:
    """The loop of a product with float32 activations, or why there is none."""
    if walk.walked(encoding):
        return Inner(None, walk.COLUMNS, (ONE,), (ONE,), None, walked=True)
    expr, *places = encoding.kept((None, K)) if isinstance(encoding, NM) else (encoding.expr((None, K)),)
    if reason := _unreadable(expr):
        return reason
    columns = span(expr)
    terms = split(_placed(expr, columns), {column}, codes=True)  # a code with its offset: what is summed stays small
    found = Inner(columns, 1, (), (), None, places=tuple(_placed(each, columns) for each in places))
    if isinstance(encoding, NM):  # the activations differ from row to row, and so does their sum
        found = replace(found, kept=encoding.keep, of=encoding.of)
        terms = [(c, f or ONE) for c, f in terms]
    varying = [(c, f) for c, f in terms if f is not None]
    constant = next((c for c, f in terms if f is None), None)
    coefficients, factors = tuple(c for c, _ in varying), tuple(f for _, f in varying)
    found = replace(found, coefficients=coefficients, factors=factors, constant=constant)
    lengths = [length for length in LENGTHS if columns is None or columns % length == 0]
    for still in (_fixed, _settled):
        for length in lengths:
            found = replace(found, length=length)
            if all(still(found.at(f, i)) for f in (*factors, *found.places) for i in range(length)):
                return found
    if columns is not None:
        return f"its codes do not unpack to whole numbers of columns within groups of {columns}"
    return replace(found, length=1)


def integers(encoding: Encoding, width: int) -> Inner | str:
    """The loop of a product with 8-bit activations in groups of `width`, or why there is none."""
    if isinstance(encoding, NM):
        return "its rows read other activations each, which are picked as floats alone"
    expr = encoding.expr((None, K))
    if reason := _unreadable(expr):
        return reason
    columns = span(expr)
    if width % 4 or (columns is not None and columns % width):
        return f"activations in groups of {width} do not divide its groups of {columns}"
    code, offset = _code(expr)
    terms = split(_placed(code, width), {column})
    varying = [(c, f) for c, f in terms if f is not None]
    constant = next((c for c, f in terms if f is None), None)
    if len(varying) != 1 or not isinstance(varying[0][1], Cast) or varying[0][1].a.dtype != "int32":
        return "its values are not multiples of an integer code"
    coefficient, factor = varying[0][0], varying[0][1].a
    for length in LENGTHS:
        if width % length == 0 and (length >= 16 or width < 16):
            found = Inner(width, length, (coefficient,), (factor,), constant, offset)
            if all(_bytes(found, i) for i in range(0, length, 4)):
                return found
    return "its codes are not bytes of neighbouring columns"


def _bytes(inner: Inner, i: int) -> bool:
    placed = inner.at(inner.factors[0], i)
    following = inner.at(inner.factors[0], i + 3)
    shifts = [tuple(at for at in indices(each) if lane not in at.free_symbols) for each in (placed, following)]
    starts = [next(loads(each)).index for each in (placed, following)]
    if shifts[0] != shifts[1] or sympy.expand(starts[1] - starts[0]) != 3:
        return False
    return cpp.byte_lanes(placed, lane, inner.ranges) is not None and _settled(placed)


def _unreadable(expr: Expr) -> str | None:
    if expr.dtype != "float32":
        return f"its values are {expr.dtype}, not float32"
    for part, dtype in stored(expr).items():
        if dtype not in cpp.VECTORS:
            return f"its part '{part}' is {dtype}"
    both = interleave.mixed(expr)
    return f"its part '{both}' is read by rows and in another way" if both else None


def _placed(expr: Expr, columns: int | None) -> Expr:
    """The expression at column `column` of group `group` in the interleaved layout."""
    at = columns * group + column if columns else column
    ranges = {**LANES, column: (0, columns - 1)} if columns else LANES
    return folded(substitute(interleave.rewritten(planes.beside(expr)), {k: at}), ranges)


def _settled(expr: Expr) -> bool:
    """Whether no division is left that depends on the piece of the loop."""
    return not any(step in part.free_symbols for at in indices(expr) for part in at.atoms(sympy.floor, sympy.Mod))


def _fixed(expr: Expr) -> bool:
    """Whether it is settled, and shifts are the same in every piece, as immediate operands are."""
    return _settled(expr) and not any(step in by.free_symbols for by in _shifts(expr))


def _shifts(expr: Expr) -> Iterator[sympy.Expr]:
    match expr:
        case Bin("shr", a, Index(by)):
            yield by
            yield from _shifts(a)
        case Bin(_, a, b):
            yield from _shifts(a)
            yield from _shifts(b)
        case Cast(_, a) | Take(index=a):
            yield from _shifts(a)


def _code(expr: Expr) -> tuple[Expr, int]:
    """The expression with `code - c` under a conversion to float32 replaced by `code`, and c."""
    match expr:
        case Cast("float32", Bin("sub", a, Const(value))) if a.dtype == "int32":
            return Cast("float32", a), int(value)
        case Bin(op, a, b):
            (left, first), (right, second) = _code(a), _code(b)
            return Bin(op, left, right), first or second
    return expr, 0
