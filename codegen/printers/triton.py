"""Tile expressions as Triton source, over tiles `n` (rows, `[N, 1]`) and `k` (columns, `[1, K]`) of int64 indices."""

from __future__ import annotations

from collections.abc import Mapping

from ...ir.encoding.expr import Bin, Cast, Const, Expr, Index, Load, Scatter, Take, k, n
from .torch import OPERATORS, index

TYPES = {"bool": "tl.int1"}  # every other dtype has one name in Triton and here


def text(expr: Expr, names: Mapping[str, str] | None = None, row_mask: str = "", column_mask: str = "") -> str:
    """The tile; `names` maps a part to its pointer argument (its own name when left out).

    A load is masked by the masks of the indices that it uses, so that its shape stays that of its own pointers: a scale
    per row is loaded once a row. Elements masked out read 0.
    """
    match expr:
        case Load(part, at, _):
            masks = [
                f"({mask})" for mask, symbol in ((row_mask, n), (column_mask, k)) if mask and symbol in at.free_symbols
            ]
            masked = f", mask={' & '.join(masks)}, other=0" if masks else ""
            return f"tl.load({(names or {}).get(part, part)} + {index(at)}{masked})"
        case Take(part, _, at, _):  # an index masked out is 0, and the table has an entry there
            return f"tl.load({(names or {}).get(part, part)} + {text(at, names, row_mask, column_mask)})"
        case Const(value):
            return repr(value)
        case Index(value, dtype):
            return f"({index(value)}).to({_type(dtype)})" if value.free_symbols else index(value)
        case Bin(op, a, b):
            left, right = (text(side, names, row_mask, column_mask) for side in (a, b))
            return f"({left} {OPERATORS[op]} {right})"
        case Cast(dtype, a):
            return f"{text(a, names, row_mask, column_mask)}.to({_type(dtype)})"
        case Scatter(_, _, _, place):
            pairs = ((text(side, names, row_mask, column_mask) for side in entry) for entry in expr.entries)
            return f"({' + '.join(f'tl.where({at} == {index(place)}, {value}, 0.0)' for at, value in pairs)})"


def _type(dtype: str) -> str:
    return TYPES.get(dtype, f"tl.{dtype}")
