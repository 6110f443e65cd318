"""Index arithmetic over known ranges: divisions and remainders that vanish, and what a load does across a vector."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, TypeAlias

import sympy

Ranges: TypeAlias = Mapping[
    sympy.Symbol, tuple[int, int]
]  # inclusive; a nonnegative symbol left out is unbounded above


def fold(index: sympy.Expr, ranges: Ranges) -> sympy.Expr:
    """The same integer with every floor and Mod simplified as far as the ranges decide.

    `floor((64*c + 16 + lane) / 32)` is `2*c` for lane in 0..15, and `floor((32*c + 16 + lane) / 64)` is `floor(c/2)`.
    """
    index = sympy.sympify(index)
    if not index.args:
        return index
    args = [fold(arg, ranges) for arg in index.args]
    if index.func is sympy.floor:
        dividend, divisor = sympy.fraction(sympy.together(args[0]))
        if divisor.is_Integer:
            whole, rest = _divide(dividend, divisor)
            step, coarse, _ = _coarsen(rest, divisor, ranges)
            return whole + sympy.floor(coarse / (divisor // step))
    if index.func is sympy.Mod and args[1].is_Integer:
        _, rest = _divide(args[0], args[1])
        step, coarse, fine = _coarsen(rest, args[1], ranges)
        return sympy.expand(step * sympy.Mod(coarse, args[1] // step)) + fine
    return sympy.expand(index.func(*args))


def _coarsen(rest: sympy.Expr, period: sympy.Integer, ranges: Ranges) -> tuple[int, sympy.Expr, sympy.Expr]:
    """`(step, coarse, fine)` with `rest = step * coarse + fine`, `step` dividing the period and fine in 0..step-1.

    Then `fine` cannot carry: it drops out of the floor, and passes through the Mod. The largest step is taken, which
    is the period itself (and coarse 0) where the whole rest lies within one period.
    """
    for step in reversed(sympy.divisors(int(period))):
        coarse, fine = _divide(rest, sympy.Integer(step))
        low, high = bounds(fine, ranges)
        if low >= 0 and high < step:
            return step, coarse, fine
    return 1, rest, sympy.Integer(0)


def _divide(dividend: sympy.Expr, divisor: sympy.Integer) -> tuple[sympy.Expr, sympy.Expr]:
    """Integer quotient and rest with `dividend = divisor * quotient + rest`, term by term."""
    quotient, rest = sympy.Integer(0), sympy.Integer(0)
    for term in sympy.Add.make_args(sympy.expand(dividend)):
        factor, unit = term.as_coeff_Mul()
        whole = factor // divisor if factor.is_Integer and unit.is_integer else sympy.Integer(0)
        quotient += whole * unit
        rest += (factor - whole * divisor) * unit
    return quotient, rest


def bounds(index: sympy.Expr, ranges: Ranges) -> tuple[float, float]:
    """Least and greatest value, by interval arithmetic; infinite where nothing is known."""
    if index.is_number:
        return float(index), float(index)
    if index.is_Symbol:
        return ranges.get(index, (0 if index.is_nonnegative else -math.inf, math.inf))
    inner = [bounds(arg, ranges) for arg in index.args]
    if index.is_Add:
        return sum(low for low, _ in inner), sum(high for _, high in inner)
    if index.is_Mul:
        low, high = 1.0, 1.0
        for a, b in inner:
            ends = [0.0 if 0 in (x, y) else x * y for x in (low, high) for y in (a, b)]
            low, high = min(ends), max(ends)
        return low, high
    if index.func is sympy.floor:
        low, high = inner[0]
        return low if math.isinf(low) else math.floor(low), high if math.isinf(high) else math.floor(high)
    if index.func is sympy.Mod and index.args[1].is_Integer:
        return 0, float(index.args[1]) - 1
    return -math.inf, math.inf


def across(index: sympy.Expr, lane: sympy.Symbol) -> Literal["uniform", "contiguous", "words", "scattered"]:
    """What a folded index does over the lanes of a vector: stay, step by one, by four, or none that can be proved."""
    if lane not in index.free_symbols:
        return "uniform"
    if lane not in sympy.expand(index - lane).free_symbols:
        return "contiguous"
    return "words" if lane not in sympy.expand(index - 4 * lane).free_symbols else "scattered"
