"""A page's tile of keys or values as Triton text, with columns parted so that a packed word is read once for its codes.

Column k is split as k = (packed · outer + code) · inner + at, over four axes [n, outer, code, at]. Where an index then
folds to one without `code`, its load has a length of 1 on that axis: the word is read once, as a run of `inner`
neighbours, and shifted for each code. The same holds for a scale that a group of columns shares.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import sympy

from ..ir.encoding.expr import Expr, indices, k, loads, substitute
from .hoist import folded
from .printers import triton as printer

OUTER, CODE, AT = sympy.symbols("outer code at", integer=True, nonnegative=True)
PACKED = (2, 4, 8)  # codes of a word


class Parted(NamedTuple):
    """How many there are of outer, code and at, and the expression over them."""

    outer: int
    packed: int
    inner: int
    expr: Expr


def parted(expr: Expr, dim: int) -> Parted | None:
    """The parting that spares the most loads; None where none spares any, or Triton's tiles cannot have the shape."""
    if dim & (dim - 1):
        return None
    best, most = None, 0
    for packed in PACKED:
        inner = dim // packed
        while inner:
            at = (packed * OUTER + CODE) * inner + AT
            ranges = {OUTER: (0, dim // (packed * inner) - 1), CODE: (0, packed - 1), AT: (0, inner - 1)}
            over = folded(substitute(expr, {k: sympy.expand(at)}), ranges)
            plain = not any(index.atoms(sympy.floor, sympy.Mod) for index in indices(over))
            spared = sum(CODE not in load.index.free_symbols for load in loads(over))
            spared -= sum(k not in load.index.free_symbols for load in loads(expr))
            if plain and spared > most:
                best, most = Parted(dim // (packed * inner), packed, inner, over), spared
            inner //= 2
    return best


def tile(expr: Expr, dim: int, padded: int, body: int, kept: int, names: Mapping[str, str]) -> str:
    """Lines that set `i` and `n`, the tokens of tile `j` in it and in the page, and return the tile [body, padded]."""
    mask = f"(n < {kept})" if kept % body else ""
    parting = parted(expr, dim) if dim == padded else None
    if parting is None:
        value = printer.text(expr, names, row_mask=mask, column_mask=f"(k < {dim})" if dim < padded else "")
        axes, ranges = "[:, None]", [("k", padded, "[None, :]")]
    else:
        value, shape = printer.text(parting.expr, names, row_mask=mask), (body, *parting[:3])
        value = f"tl.reshape(tl.broadcast_to({value}, {shape}), ({body}, {dim}))"
        axes, ranges = "[:, None, None, None]", [
            ("outer", parting.outer, "[None, :, None, None]"),
            ("code", parting.packed, "[None, None, :, None]"),
            ("at", parting.inner, "[None, None, None, :]"),
        ]  # fmt: skip
    lines = [f"{name} = tl.arange(0, {length}){axis}" for name, length, axis in ranges]
    lines += [f"i = tl.arange(0, {body}){axes}", f"n = j * {body} + i", f"return {value}"]
    return "\n".join(f"    {line}" for line in lines)
