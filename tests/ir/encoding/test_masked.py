"""masked: zeros where the bits are, values of the other encoding elsewhere, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from smelt.codegen.printers import torch as printed
from smelt.ir.encoding import Affine, Dense, Encoding, Masked, parse
from smelt.ir.errors import SmeltError


@pytest.mark.parametrize("of", [Dense("float16"), Affine(4, 16)], ids=str)
def test_values_stay_where_their_bits_are(of: Encoding) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(5, 96, generator=random).half().float()
    kept = torch.rand(5, 96, generator=random) > 0.3
    encoding, plain = Masked(of), of.decode(of.encode(x), (5, 96))
    parts = {f"a_{part}": value for part, value in of.encode(x).items()} | encoding.bits(kept)
    found = encoding.decode(parts, (5, 96))
    assert torch.equal(found, torch.where(kept, plain, 0.0))
    assert (found != encoding.decode(parts | encoding.bits(kept.roll(1, 1)), (5, 96))).sum() > 80
    rows, columns = torch.arange(5)[:, None], torch.arange(96)[None]
    assert torch.equal(printed.evaluate(encoding.expr((5, 96)), parts, rows, columns), found)
    again = of.decode(of.encode(x * kept), (5, 96))
    assert torch.equal(encoding.decode(encoding.encode(x * kept), (5, 96)), again)
    assert parse(encoding.spec()) == encoding


def test_what_it_refuses() -> None:
    assert "must be a multiple of 16 (1-bit packing)" in str(Masked(Dense("float16")).refuses((4, 40)))
    assert "needs a tensor" in str(Masked(Dense("float16")).refuses((64,)))
    assert "must be a multiple of 32" in str(Masked(Affine(4, 0)).refuses((4, 48)))
    with pytest.raises(SmeltError, match="of is an encoding"):
        Masked("float16")  # type: ignore[arg-type]
