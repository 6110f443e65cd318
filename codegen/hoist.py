"""Hoisting: what is constant over an inner loop leaves it, so that `Σ s·(q−z)·x` becomes `s·Σ q·x − s·z·Σ x`."""

from __future__ import annotations

from collections.abc import Set
from typing import TypeAlias

import sympy

from ..ir.encoding.expr import Bin, Cast, Const, Expr, indices, loads, rebuilt, substitute
from ..ir.encoding.expr import k as COLUMN
from .ranges import Ranges, fold

Term: TypeAlias = tuple[Expr, Expr | None]  # (coefficient, factor): their product; no factor is a factor of 1


def folded(expr: Expr, ranges: Ranges) -> Expr:
    """The expression with every index folded over the ranges."""
    return rebuilt(expr, lambda inner: folded(inner, ranges), lambda index: fold(index, ranges))


def depends(expr: Expr, on: Set[sympy.Symbol]) -> bool:
    """Whether any index in the tree has one of the symbols."""
    return any(index.free_symbols & on for index in indices(expr))


def split(expr: Expr, inner: Set[sympy.Symbol], codes: bool = False) -> list[Term]:
    """A float32 expression as a sum of coefficient times factor, where no coefficient depends on an inner symbol.

    Terms without a factor come last and as one. Sums and differences of int32 codes pass through the conversion to
    float32, which is exact for codes below 2^24; with `codes` they stay together as one factor.
    """
    terms = _terms(expr, inner, codes)
    constant = [coefficient for coefficient, factor in terms if factor is None]
    total = constant[0] if constant else None
    for coefficient in constant[1:]:
        total = Bin("add", total, coefficient) if total is not None else coefficient
    return [term for term in terms if term[1] is not None] + ([(total, None)] if total is not None else [])


def _terms(expr: Expr, inner: Set[sympy.Symbol], codes: bool) -> list[Term]:
    if not depends(expr, inner):
        return [(expr, None)]
    match expr:
        case Bin("add", a, b) if expr.dtype == "float32":
            return _terms(a, inner, codes) + _terms(b, inner, codes)
        case Bin("sub", a, b) if expr.dtype == "float32":
            return _terms(a, inner, codes) + _scaled(Const(-1.0, "float32"), _terms(b, inner, codes))
        case Bin("mul", a, b) if expr.dtype == "float32" and not depends(a, inner):
            return _scaled(a, _terms(b, inner, codes))
        case Bin("mul", a, b) if expr.dtype == "float32" and not depends(b, inner):
            return _scaled(b, _terms(a, inner, codes))
        case Cast("float32", Bin("add" | "sub" as op, a, b)) if a.dtype == "int32" and not codes:
            return _terms(Bin(op, _float(a), _float(b)), inner, codes)
    return [(Const(1.0, "float32"), expr)]


def _scaled(by: Expr, terms: list[Term]) -> list[Term]:
    return [(_product(by, coefficient), factor) for coefficient, factor in terms]


def _product(a: Expr, b: Expr) -> Expr:
    match a, b:
        case Const(x), Const(y):
            return Const(x * y, "float32")
        case (Const(1.0), other) | (other, Const(1.0)):
            return other
    return Bin("mul", a, b)


def _float(expr: Expr) -> Expr:
    return Const(float(expr.value), "float32") if isinstance(expr, Const) else Cast("float32", expr)


def span(expr: Expr) -> int | None:
    """Columns over which as many loads as possible leave the loop (the group), None for the whole row.

    Candidates are the divisors of the column in the index arithmetic; the longest wins among those that leave the
    fewest loads inside. A byte that is read for several columns stays inside: its fields change.
    """
    divisors = {
        int(divisor)
        for index in indices(expr)
        for floor in index.atoms(sympy.floor)
        if COLUMN in floor.free_symbols and (divisor := sympy.fraction(sympy.together(floor.args[0]))[1]).is_Integer
    }
    best, fewest = None, _inside(expr, {COLUMN})
    outer, i = sympy.symbols("outer i", integer=True, nonnegative=True)
    for length in sorted(divisors, reverse=True):
        inside = _inside(folded(substitute(expr, {COLUMN: length * outer + i}), {i: (0, length - 1)}), {i})
        if inside < fewest:
            best, fewest = length, inside
    return best


def _inside(expr: Expr, symbols: Set[sympy.Symbol]) -> int:
    return sum(1 for _, factor in split(expr, symbols) if factor is not None for _ in loads(factor))
