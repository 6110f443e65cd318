"""Codes of 3 bits as products read them: every bit is found where it was put, and eight codes cost one choice."""

import re
from typing import Any

import pytest
import sympy
import torch

from smelt.codegen import gemv
from smelt.codegen.interleave import ROWS, lane, length, pack, rewritten, tile
from smelt.codegen.planes import beside, moved
from smelt.codegen.printers import torch as reference
from smelt.ir.encoding import Affine
from smelt.ir.encoding.expr import stored

K = sympy.Symbol("K", integer=True, positive=True)
N, COLUMNS = 20, 192


def read(encoding: Affine, held: dict[str, torch.Tensor]) -> torch.Tensor:
    """All values of a matrix [N, COLUMNS] by the expression of products, over parts as encodings store them."""
    expr = encoding.expr((None, K))
    placed = beside(expr)
    parts = pack(placed, moved(expr, held), N, torch.Tensor.contiguous)
    sizes: dict[str, Any] = {str(length(name)): part.shape[1] for name, part in parts.items()}
    flat = {name: part.view(getattr(torch, stored(placed)[name])) for name, part in parts.items()}
    row, column = torch.arange(N)[:, None], torch.arange(COLUMNS)[None]
    places: dict[str, Any] = {"K": COLUMNS, str(tile): row // ROWS, str(lane): row % ROWS, **sizes}
    return reference.evaluate(rewritten(placed), flat, row, column, **places)


@pytest.mark.parametrize("group", [64, 32])
def test_reads_what_is_stored(group: int) -> None:
    encoding = Affine(3, group, zero=True)
    held = encoding.encode(torch.randn(N, COLUMNS, generator=torch.Generator().manual_seed(0)))
    wanted = encoding.decode(held, (N, COLUMNS))
    assert torch.equal(read(encoding, held), wanted)
    held["high"][7, 3] ^= 1 << 5  # one bit is one weight, of row 7 and column 53
    assert (read(encoding, held) != wanted).nonzero().tolist() == [[7, 53]]


def test_a_whole_code_lies_in_every_nibble() -> None:
    text = gemv.source(Affine(3, 128))
    assert text.count("= DECODE(") == 64  # each column is looked up as one of 4 bits is
    choices = re.findall(
        r"either\((0x\w+, load_words\(p_high0 .*?tile\)\)\)), load_words\(p_codes0 .*?tile\)\)\)", text
    )
    assert len(choices) == 64 and len(set(choices)) == 8
