"""Tile expressions in PyTorch, by advanced indexing: the reference that `decode` and the other printers agree with."""

from __future__ import annotations

from collections.abc import Mapping

import sympy
import torch

from ...ir.encoding.expr import Bin, Cast, Const, Expr, Index, Load, Scatter, Take
from .index import text as index_text

OPERATORS = {"add": "+", "sub": "-", "mul": "*", "and": "&", "shr": ">>"}


def index(e: sympy.Expr) -> str:
    """A nonnegative integer expression in Python, on ints or integer tensors."""
    return index_text(e, "//")


def text(expr: Expr) -> str:
    """Source over flat parts by name, and integer tensors `n` (rows) and `k` (columns) that broadcast."""
    match expr:
        case Load(part, at, _):
            return f"{part}[{index(at)}]"
        case Take(part, _, at, _):
            return f"{part}[{text(at)}]"
        case Const(value, dtype):
            return f"torch.tensor({value!r}, dtype=torch.{dtype})"
        case Index(value, dtype):
            return f"torch.as_tensor({index(value)}).to(torch.{dtype})"
        case Bin(op, a, b):
            return f"({text(a)} {OPERATORS[op]} {text(b)})"
        case Cast(dtype, a):
            return f"{text(a)}.to(torch.{dtype})"
        case Scatter(_, _, _, place):
            entries = (f"torch.where({text(at)} == {index(place)}, {text(value)}, 0.0)" for at, value in expr.entries)
            return f"({' + '.join(entries)})"


def evaluate(
    expr: Expr, parts: Mapping[str, torch.Tensor], rows: torch.Tensor, columns: torch.Tensor, **symbols: int
) -> torch.Tensor:
    """The expression at `rows` and `columns` (int64, broadcast together); parts are one slice each, `[N, …]`."""
    names = {part: tensor.reshape(-1) for part, tensor in parts.items()}
    # the text is printed above from a tree that holds names and numbers only
    value: torch.Tensor = eval(text(expr), {"torch": torch, "n": rows, "k": columns, **symbols, **names})
    return value.expand(torch.broadcast_shapes(rows.shape, columns.shape))
