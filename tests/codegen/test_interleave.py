"""The layout of weights: bytes are moved and never changed, and the rewritten expression finds every one of them."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch

from smelt.codegen.interleave import ROWS, interleaved, lane, length, mixed, pack, rewritten, tile, unit
from smelt.codegen.printers import torch as reference
from smelt.ir.encoding import Affine, Dense, Encoding
from smelt.ir.encoding.expr import Bin, Cast, Expr, Index, Load, Take, k, n, stored, substitute

ENCODINGS: list[Encoding] = [
    Dense("float32"),
    Dense("bfloat16"),
    Affine(4, 64),
    Affine(8, 0, zero=True),
    Affine(2, 64, scale="float32"),
    Affine(4, 3, "channel", zero=True),
]
K = sympy.Symbol("K", integer=True, positive=True)
COLUMNS = 192


def packed(encoding: Encoding, rows: int) -> tuple[Expr, dict[str, torch.Tensor], torch.Tensor]:
    """The expression, the packed parts, and what they stand for."""
    w = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(0))
    parts = encoding.encode(w)
    expr = encoding.expr((None, K))
    return expr, pack(expr, parts, rows, torch.Tensor.contiguous), encoding.decode(parts, (rows, COLUMNS))


def read(expr: Expr, parts: dict[str, torch.Tensor], rows: int) -> torch.Tensor:
    """All values by the rewritten expression: row n is lane n % 16 of tile n / 16."""
    row, column = torch.arange(rows)[:, None], torch.arange(COLUMNS)[None]
    flat = {name: part.contiguous().view(getattr(torch, stored(expr)[name])) for name, part in parts.items()}
    sizes = {str(length(name)): part.shape[1] if part.dim() > 2 else 0 for name, part in parts.items()}
    places: dict[str, Any] = {"K": COLUMNS, "tile": row // ROWS, "lane": row % ROWS, **sizes}
    return reference.evaluate(rewritten(expr), flat, row, column, **places).expand(rows, COLUMNS)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
@pytest.mark.parametrize("rows", [3, 48, 63, 129])
def test_the_rewritten_expression_reads_the_same_values(encoding: Encoding, rows: int) -> None:
    expr, parts, wanted = packed(encoding, rows)
    assert torch.equal(read(expr, parts, rows), wanted)


@pytest.mark.parametrize("moved", [1, 16, 64])
def test_the_comparison_catches_bytes_out_of_place(moved: int) -> None:
    expr, parts, wanted = packed(Affine(4, 64), 63)
    parts["codes"] = (
        parts["codes"]
        .view(torch.uint8)
        .flatten()
        .roll(moved)[: parts["codes"].numel() * 4]
        .view(parts["codes"].view(torch.uint8).shape)
        .view(torch.int32)
    )
    assert (read(expr, parts, 63) != wanted).float().mean() > 0.5


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_parts_keep_their_bytes_and_are_padded_with_zeros(encoding: Encoding) -> None:
    for rows in (48, 63):
        w = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(1))
        parts = encoding.encode(w)
        expr = encoding.expr((None, K))
        for name, part in pack(expr, parts, rows, torch.Tensor.contiguous).items():
            if name not in interleaved(expr):
                assert torch.equal(part, parts[name])
                continue
            before, after = (
                each.contiguous().view(-1).view(torch.uint8).sort(descending=True).values
                for each in (parts[name], part)
            )
            assert part.shape[0] == -(-rows // ROWS) and part.shape[2] == ROWS
            assert torch.equal(after[: len(before)], before) and not after[len(before) :].any()


def test_rows_that_fill_no_unit_are_padded() -> None:
    part = torch.arange(5 * 7, dtype=torch.uint8).view(5, 7)
    expr = Cast("int32", Load("codes", 7 * n + k, "uint8"))
    out = pack(expr, {"codes": part}, 5, torch.Tensor.contiguous)["codes"]
    assert out.shape[:3] == (1, 2, ROWS)
    units = out.view(torch.uint8).view(2, ROWS, 4)
    assert units[1, 2].tolist() == [18, 19, 20, 0] and not units[:, 5:].any()


def test_units_are_words_or_elements() -> None:
    assert [unit(dtype) for dtype in ("uint8", "int8", "float16", "bfloat16", "int16", "float32", "int32")] == [
        *(4, 4, 1, 1, 1, 1, 1)
    ]


def test_what_stands_row_after_row_is_interleaved() -> None:
    rowwise, shared = Load("a", K * n + k, "float32"), Load("b", k, "float32")
    by_block, twisted = Load("c", (n // 4) * K + k, "float32"), Load("d", k * n, "float32")
    table = Take("t", 8, Cast("int32", Load("i", n * K + k, "uint8")), "float32")
    both = Bin("add", Bin("add", rowwise, shared), Bin("add", Bin("mul", by_block, twisted), table))
    assert interleaved(both) == {"a", "i"}
    assert mixed(both) is None
    assert mixed(Bin("add", rowwise, Load("a", k, "float32"))) == "a"
    assert mixed(Bin("add", table, Load("t", n, "float32"))) == "t"


def test_the_lanes_of_a_load_are_neighbours() -> None:
    load = rewritten(Load("scale", n * 3 + k // 64, "float16"))
    assert isinstance(load, Load) and sympy.expand(load.index.subs(lane, lane + 1) - load.index) == 1
    code = rewritten(Load("codes", n * 96 + k, "uint8"))
    assert isinstance(code, Load) and sympy.expand(code.index.subs(lane, lane + 1) - code.index) == 4
    assert sympy.expand(load.index.subs(tile, tile + 1) - load.index) == ROWS * length("scale")


def test_rows_in_other_indices_become_tile_and_lane() -> None:
    row = rewritten(Load("scale", (n // 4) * 3 + k, "float32"))
    assert isinstance(row, Load) and n not in row.index.free_symbols
    assert substitute(row, {tile: 2, lane: 9, k: 0}) == Load("scale", sympy.Integer(30), "float32")
    assert rewritten(Index(4 * sympy.Mod(n, 2) + k)) == Index(4 * sympy.Mod(ROWS * tile + lane, 2) + k)
