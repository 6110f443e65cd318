"""How the pages of a cache body become floats in the attention kernel, and what of an encoding never has to.

Where an encoding is affine in its code with coefficients that are constant over the tokens of a tile (per-channel
keys), they go to the query; where they are constant over a span of columns (per-token values), to the weights. What is
read then are plain codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy

from ..ir.cache import Site
from ..ir.encoding import Encoding
from ..ir.encoding.expr import Cast, Const, Expr, Load, k, n, substitute
from .hoist import folded, span, split
from .printers.cpp import LANES, scalar, vector

TILES = (32, 16)  # tokens read at once
LANE, TOKEN, TILE, COLUMN, SPAN = sympy.symbols("lane i j column span", integer=True, nonnegative=True)
ONE = Const(1.0, "float32")


@dataclass(frozen=True)
class Loader:
    """The value at token `i` of tile `j` (token `n` of the page), column `k`, is `factor`, or scale · factor + zero.

    `scale` and `zero` have one entry a span of `wide` columns (values), or one that holds for the tile (keys).
    """

    factor: Expr
    wide: int
    scale: tuple[Expr, ...] = ()
    zero: tuple[Expr | None, ...] = ()


def of_keys(encoding: Encoding, page: tuple[int, int], tile: int) -> Loader:
    """Factors that are constant over the `tile` tokens of every tile leave the loop over tokens."""
    expr = encoding.expr(page)
    inside = folded(substitute(expr, {n: tile * TILE + TOKEN}), {TOKEN: (0, tile - 1), k: (0, page[1] - 1)})
    scale, factor, zero = _affine(inside, TOKEN)
    if factor is None or scale == ONE:
        return Loader(expr, page[1])
    return Loader(factor, page[1], (scale,), (zero,))


def of_values(encoding: Encoding, page: tuple[int, int]) -> Loader:
    """Factors that are constant over spans of whole vectors of columns leave the loop over columns."""
    expr, dim = encoding.expr(page), page[1]
    wide = span(expr) or dim
    if wide % LANES or dim % wide:
        return Loader(expr, dim)
    inside = folded(substitute(expr, {k: wide * SPAN + COLUMN}), {COLUMN: (0, wide - 1)})
    scale, factor, zero = _affine(inside, COLUMN)
    if factor is None or scale == ONE:
        return Loader(expr, dim)
    spans = range(dim // wide)
    return Loader(
        _at_columns(factor, wide),
        wide,
        tuple(substitute(scale, {SPAN: sympy.Integer(s)}) for s in spans),
        tuple(None if zero is None else substitute(zero, {SPAN: sympy.Integer(s)}) for s in spans),
    )


def _at_columns(factor: Expr, wide: int) -> Expr:
    """A factor over (span, column inside) as one over k again."""
    return substitute(factor, {SPAN: sympy.floor(k / wide), COLUMN: sympy.Mod(k, wide)})


def _affine(expr: Expr, inner: sympy.Symbol) -> tuple[Expr, Expr | None, Expr | None]:
    """(scale, factor, zero): expr = scale · factor + zero, and only the factor depends on `inner`; else no factor."""
    terms = split(expr, {inner})
    varying = [(scale, factor) for scale, factor in terms if factor is not None]
    constant = [scale for scale, factor in terms if factor is None]
    if len(varying) != 1:
        return ONE, None, None
    return *varying[0], constant[0] if constant else None


def row(expr: Expr, dim: int, into: str, names: Mapping[str, str] | None = None) -> list[str]:
    """C++ statements that write the expression at columns 0 … dim - 1, and zeros up to a whole vector."""
    whole, padded = dim // LANES * LANES, -(-dim // LANES) * LANES
    lines = []
    for c in range(0, whole, LANES):
        lines.append(f"store({into} + {c}, {vector(substitute(expr, {k: c + LANE}), LANE, {}, names)});")
    for c in range(whole, dim):
        lines.append(f"{into}[{c}] = {scalar(substitute(expr, {k: sympy.Integer(c)}), names)};")
    return lines + [f"{into}[{c}] = 0;" for c in range(dim, padded)]


def dense_row(dtype: str, dim: int) -> list[str]:
    """Statements that convert the row `x` of `dim` stored numbers to the floats `y`."""
    load = Load("x", k, dtype)
    return row(load if dtype == "float32" else Cast("float32", load), dim, "y")


@dataclass(frozen=True)
class Body:
    """The loaders of a site's body, and how many tokens a tile has."""

    tile: int
    keys: Loader
    values: Loader

    @classmethod
    def of(cls, site: Site) -> Body:
        """The longest tile over which the factors of the keys are constant, or the longest if they never are."""
        values = of_values(site.value_encoding, (site.kept, site.value_dim))
        for tile in TILES:
            keys = of_keys(site.key_encoding, (site.kept, site.key_dim), tile)
            if keys.scale:
                return cls(tile, keys, values)
        return cls(TILES[0], of_keys(site.key_encoding, (site.kept, site.key_dim), TILES[0]), values)
