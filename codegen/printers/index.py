"""Index arithmetic as text, shared by the printers: languages differ in how they write an integer division."""

from __future__ import annotations

from typing import Literal

import sympy


def text(e: sympy.Expr, division: Literal["/", "//"]) -> str:
    """A nonnegative integer expression; every operand of a division is nonnegative, so that truncation is floor."""
    e = sympy.sympify(e)
    if e.is_Integer or e.is_Symbol:
        return str(e)
    if e.is_Add:
        return "(" + " + ".join(text(arg, division) for arg in e.args) + ")"
    if e.is_Mul and not any(arg.is_Rational and not arg.is_Integer for arg in e.args):
        return "(" + " * ".join(text(arg, division) for arg in e.args) + ")"
    if e.func is sympy.floor:
        dividend, divisor = sympy.fraction(sympy.together(e.args[0]))
        return f"({text(dividend, division)} {division} {text(divisor, division)})"
    if e.func is sympy.Mod:
        return f"({text(e.args[0], division)} % {text(e.args[1], division)})"
    raise NotImplementedError(f"an index with {e.func.__name__}: {e}")
