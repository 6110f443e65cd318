"""How the pages of a cache body become floats in the attention kernel, and what of an encoding never has to.

Where an encoding is affine in its code with coefficients that are constant over the tokens of a tile (per-channel
keys), they go to the query; where they are constant over a span of columns (per-token values), to the weights. What is
read then are plain codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import sympy
import torch

from ..ir.cache import Site
from ..ir.encoding import Encoding
from ..ir.encoding.expr import Bin, Cast, Const, Expr, Index, Load, k, n, rebuilt, stored, substitute
from ..ir.encoding.rotated import Rotated
from .attention_columns import Columns, columns
from .hoist import folded, span, split
from .printers.cpp import LANES, scalar, vector

TILES = (32, 16)  # tokens read at once
LANE, TOKEN, TILE, COLUMN, SPAN = sympy.symbols("lane i j column span", integer=True, nonnegative=True)
ONE = Const(1.0, "float32")
SPIN = "spin"  # the name of a rotation among the parts


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
    ranges = {TOKEN: (0, tile - 1), TILE: (0, max(1, -(-page[0] // tile)) - 1), k: (0, page[1] - 1)}
    inside = folded(substitute(expr, {n: tile * TILE + TOKEN}), ranges)
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
        lines.append(f"store({into} + {c}, {column(expr, c, names)});")
    for c in range(whole, dim):
        lines.append(f"{into}[{c}] = {scalar(substitute(expr, {k: sympy.Integer(c)}), names)};")
    return lines + [f"{into}[{c}] = 0;" for c in range(dim, padded)]


def column(expr: Expr, c: int, names: Mapping[str, str] | None = None) -> str:
    """The expression at columns c … c + 15 as a C++ vector."""
    at = folded(substitute(expr, {k: c + LANE}), {LANE: (0, LANES - 1)})
    return vector(trimmed(at), LANE, {}, names)


def dense_row(dtype: str, dim: int) -> list[str]:
    """Statements that convert the row `x` of `dim` stored numbers to the floats `y`."""
    load = Load("x", k, dtype)
    return row(load if dtype == "float32" else Cast("float32", load), dim, "y")


@dataclass(frozen=True)
class Part:
    """What a kernel reads of a page: `sample` [1, …] of a slot, or, if `shared`, of a table [G or 1, …]."""

    role: str
    name: str
    sample: torch.Tensor
    shared: bool


@dataclass(frozen=True)
class Form:
    """A body as kernels see it: pages of `cap` tokens and how they are encoded.

    `turned`: keys are kept as they were before the rotary turn, which couples columns, so that nothing leaves them.
    `spins`: the orthogonal matrices of rows that keys, and values, were multiplied with before they were encoded. The
    queries of keys are multiplied with the same (turned keys are multiplied back), and what is read of values at the
    end.
    """

    cap: int
    key_dim: int
    value_dim: int
    keys: Encoding
    values: Encoding
    turned: bool = False
    spins: tuple[Rotated | None, Rotated | None] = (None, None)

    @classmethod
    def of(cls, site: Site, number: int) -> Form:
        """Body `number` of a site."""
        pair = site.encodings[number]
        keys, values = (e.inner if isinstance(e, Rotated) else e for e in pair)
        first, second = (e if isinstance(e, Rotated) else None for e in pair)
        turned = site.frame == "pre" and site.rope is not None
        dims = site.key_dim, site.value_dim
        if any(spin and dim % LANES for spin, dim in zip((first, second), dims, strict=True)):
            raise NotImplementedError(f"a rotation of heads of {dims} numbers, which are no whole vectors")
        return cls(site.caps[number], *dims, keys, values, turned, (first, second))

    @property
    def parts(self) -> list[Part]:
        """Parts that the expressions read, of keys and then of values, in the order of `Pages.parts`."""
        roles = (("keys", self.keys, self.key_dim), ("values", self.values, self.value_dim))
        out = []
        for (role, encoding, dim), spin in zip(roles, self.spins, strict=True):
            held, tables = samples(encoding, self.cap, dim)
            for name in stored(encoding.expr((self.cap, dim))):
                out.append(Part(role, name, held[name] if name in held else tables[name], name not in held))
            if spin is not None:
                matrix = spin.rotation(dim)
                matrix = matrix.T if role == "keys" and not self.turned else matrix
                out.append(Part(role, SPIN, matrix[None].contiguous(), True))
        return out


@cache
def samples(encoding: Encoding, cap: int, dim: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The parts [1, …] of a page of an encoding, and its tables."""
    x = torch.zeros(1, cap, dim)
    if encoding.calibrated:
        x = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    tables = encoding.fit(x)
    return dict(encoding.encode(x, tables or None)), tables


@dataclass(frozen=True)
class Body:
    """The loaders of a body, and how many tokens a tile has.

    `columns`: keys are read as columns, a vector holding one channel of 16 tokens; None: as rows. `factors`: likewise
    the scales and zeros of values, one after the other.
    """

    tile: int
    keys: Loader
    values: Loader
    columns: Columns | None = None
    factors: Columns | None = None

    @classmethod
    def of(cls, form: Form) -> Body:
        """The longest tile over which the factors of the keys are constant, or the longest if they never are."""
        page = (form.cap, form.key_dim)
        values = of_values(form.values, (form.cap, form.value_dim))
        zeros = (zero or Const(0.0, "float32") for zero in values.zero)
        spread = columns([x for pair in zip(values.scale, zeros, strict=True) for x in pair], form.cap)
        factors = spread if values.scale else None
        if form.turned:
            return cls(TILES[0], Loader(form.keys.expr(page), form.key_dim), values, None, factors)
        found = [(tile, of_keys(form.keys, page, tile)) for tile in TILES]
        tile, keys = next(((t, loader) for t, loader in found if loader.scale), found[0])
        return cls(tile, keys, values, _columns(keys, tile, form), factors)


def _columns(keys: Loader, tile: int, form: Form) -> Columns | None:
    """Keys as columns where that costs less than sums over lanes: where they are codes."""
    inside = substitute(keys.factor, {TOKEN: n - tile * TILE})
    each = [substitute(inside, {k: sympy.Integer(d)}) for d in range(form.key_dim)]
    found = columns(each, form.cap, shifts=bool(keys.scale))
    return found if found and found.codes else None


def trimmed(expr: Expr) -> Expr:
    """Without masks of what the shift of a byte has left."""
    match expr:
        case Bin("and", Bin("shr", Cast("int32", Load(_, _, "uint8")), Index(by)) as inner, Const(mask)):
            by = sympy.sympify(by)
            return inner if by.is_Integer and int(mask) >= 255 >> int(by) else expr
    return rebuilt(expr, trimmed, lambda index: index)
