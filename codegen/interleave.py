"""The layout in which matrix products read weights: sixteen rows side by side, so that a vector's lanes are rows.

A part whose elements stand row after row, [N, L], becomes [N / 16, L / u, 16, u] with units of u elements: one where an
element fills 16 bits or more, four bytes otherwise. A vector then loads one unit of sixteen rows, one activation serves
all of its lanes, and a sum needs no reduction across them. Rows are padded to whole tiles with zeros. Bytes are moved,
never changed: whatever an encoding stores, its expression reads it in the new places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import sympy
import torch

from ..ir.encoding.expr import Bin, Cast, Expr, Load, Scatter, Take, k, n, rebuilt, stored

ROWS = 16
tile, lane = sympy.symbols("tile lane", integer=True, nonnegative=True)


def unit(dtype: str) -> int:
    """Elements of a row that stand together."""
    return 4 if dtype in ("uint8", "int8") else 1


def length(part: str) -> sympy.Symbol:
    """Units in a row of a part, which a kernel is told."""
    return sympy.Symbol(f"{part}_row", integer=True, nonnegative=True)


def rewritten(expr: Expr) -> Expr:
    """The expression over tile and lane in place of the row, reading interleaved parts."""
    match expr:
        case Load(part, index, dtype):
            column = _column(index)
            if column is None:
                return Load(part, index.xreplace({n: ROWS * tile + lane}), dtype)
            u = unit(dtype)
            at = ((tile * length(part) + column // u) * ROWS + lane) * u
            return Load(part, at + sympy.Mod(column, u) if u > 1 else at, dtype)
    return rebuilt(expr, rewritten, lambda index: index.xreplace({n: ROWS * tile + lane}))


def interleaved(expr: Expr) -> frozenset[str]:
    """The parts that stand interleaved; others keep their order."""
    match expr:
        case Load(part, index, _):
            return frozenset({part}) if _column(index) is not None else frozenset()
        case Take(part=_, index=index):
            return interleaved(index)
        case Bin(_, a, b):
            return interleaved(a) | interleaved(b)
        case Cast(_, a):
            return interleaved(a)
        case Scatter(index, value):
            return interleaved(index) | interleaved(value)
    return frozenset()


def mixed(expr: Expr) -> str | None:
    """A part that is read both row by row and in another way, which no layout serves, or None."""
    other = _others(expr) & interleaved(expr)
    return min(other) if other else None


def pack(
    expr: Expr, parts: Mapping[str, torch.Tensor], rows: int, hold: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The parts of a matrix of so many rows as kernels read them: [tiles, units, 16, u], or as they are.

    `hold` copies a tensor of any strides to a contiguous one.
    """
    moved, held = interleaved(expr), {}
    for part, dtype in stored(expr).items():
        value = parts[part]
        held[part] = hold(_interleave(value.reshape(rows, -1), unit(dtype)) if part in moved else value)
    return held


def _interleave(part: torch.Tensor, u: int) -> torch.Tensor:
    rows, columns = part.shape
    down, right = -rows % ROWS, -columns % u
    if down or right:
        part = torch.nn.functional.pad(part, (0, right, 0, down))
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[u * part.element_size()]
    whole = part.contiguous().view(words)  # [N, units]
    return whole.view(-1, ROWS, whole.shape[1]).transpose(1, 2)  # moved a unit at a time by who copies it


def _column(index: sympy.Expr) -> sympy.Expr | None:
    """The index within a row, if rows follow one another; None if the row is not in the index, or not like that."""
    index = sympy.expand(sympy.sympify(index))
    stride = index.coeff(n, 1)
    rest = sympy.expand(index - stride * n)
    if stride == 0 or n in rest.free_symbols or {n, k} & stride.free_symbols:
        return None
    return rest


def _others(expr: Expr) -> frozenset[str]:
    match expr:
        case Load(part, index, _):
            return frozenset({part}) if _column(index) is None else frozenset()
        case Take(part=part, index=index):
            return _others(index) | {part}
        case Bin(_, a, b):
            return _others(a) | _others(b)
        case Cast(_, a):
            return _others(a)
        case Scatter(index, value):
            return _others(index) | _others(value)
    return frozenset()
