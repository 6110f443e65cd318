"""What a stored matrix is for: `fast` is read in less time than a dense one, `capacity` takes less memory alone."""

from __future__ import annotations

from collections.abc import Iterator

from ..ir.encoding import Bitmap, Encoding, LowRank, Sum, Tiered
from ..ir.encoding.expr import Bin, Cast, Expr, Scatter, Take
from ..ir.ops import EXPERTS, HEAD, LINEAR, arguments
from ..ir.program import Program
from . import gemv
from .choices import takes_encoded, weight_of
from .compiler import defines
from .loops import K

# what the walk of `Tiered` is written for, see walk.py
_VECTORS = ("__AVX512VBMI2__", "__AVX512VBMI__", "__AVX512BW__", "__POPCNT__")
_RANK = 2  # int8 with 4 side products takes 1.9 times as long as float16, one of them some 0.25


def slow(encoding: Encoding) -> str | None:
    """Why products with such a matrix take this CPU no less time than with 16-bit floats, or None where they do.

    Numbers: one row of x, two Zen 5 cores, 2026-11-22.
    """
    if isinstance(encoding, Bitmap):
        # [4096, 1024] with half of it zero: 320 us, float16 265, 2:4 of float16 159; 230 and 250 at best elsewhere
        return "its values have no places of their own, and one row is found after another; N:M patterns are faster"
    if isinstance(encoding, Tiered):
        return None if defines(*_VECTORS) else "its codes are read one by one, as this CPU lacks AVX-512 VBMI2"
    for term in encoding.terms if isinstance(encoding, Sum) else (encoding,):
        if isinstance(term, LowRank) and term.rank > _RANK:
            return f"each of its values is a sum of {term.rank} products"
    for table in _tables(encoding.expr((None, K))):
        # an entry a lane, see prelude.py: of a table of 256 rows of 8 numbers 3.6 times as long as float16
        if table.size > (16 if table.dtype == "float32" else 64) or not defines("__AVX512BW__"):
            return f"its table of {table.size} entries is not held in registers, and is read one by one"
    return None


def _tables(expr: Expr) -> Iterator[Take]:
    match expr:
        case Take(index=index):
            yield expr
            yield from _tables(index)
        case Bin(_, a, b) | Scatter(a, b):
            yield from _tables(a)
            yield from _tables(b)
        case Cast(_, a):
            yield from _tables(a)


def capacity(program: Program) -> dict[str, str]:
    """The products of a program whose matrices take less memory but no less time, by node, and why."""
    found: dict[str, str] = {}
    for node in program.graph.nodes:
        if node.target in (LINEAR.target, HEAD.target, EXPERTS.target):
            for name in takes_encoded(node):
                value = arguments(node)[name]
                weight = weight_of(program, value)
                if weight is None or gemv.covers(weight.encoding, weight.shape[-2:]):
                    continue  # computed, or of no kernel at all
                if why := slow(weight.encoding):
                    found[node.name] = f"{value.target} as {weight.encoding.form} saves memory but no time: {why}"
    return found
