"""Matrix products with weights in encodings of several parts and with tables: fused from their expressions alone."""

import pytest
import torch

from smelt.codegen.gemv import Gemv, covers, name
from smelt.ir.encoding import (
    NM,
    Affine,
    ChannelScaled,
    Codebook,
    Encoding,
    LowRank,
    Nonuniform,
    Rotated,
    Sparse,
    Sum,
)
from smelt.ir.errors import SmeltError

from .mutants import mutant

TOLERANCE = 1e-7  # of the sum of magnitudes
ENCODINGS = {
    "three bits": Affine(3, 64, zero=True),
    "codebook": Codebook(4, 8, shared=True),
    "banks of tables": Codebook(1, 3, shared=True, norm=True, banks=8),
    "added books": Sum((*(Codebook(4, 4, shared=True, norm=True),) * 2, LowRank(4))),
    "scaled channels": ChannelScaled(Affine(8, 0)),
    "two of four": NM(2, 4, Affine(4, 64)),
    "one of sixteen, with zeros": NM(1, 16, Affine(8, 16, zero=True)),
    "four of eight": NM(4, 8),
    "a sum": Sum((Affine(8, 0), LowRank(2), Sparse(2))),
}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def off(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> float:
    """Greatest error relative to the sum of |x| times the row's greatest |w|; NaN counts as infinite."""
    size = x.double().abs().sum(-1, keepdim=True) * w.double().abs().amax(-1)
    return float(((y - x.double() @ w.double().t()).abs() / size).nan_to_num(nan=float("inf")).max())


def multiplied(encoding: Encoding, w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    out = torch.full((x.shape[0], w.shape[0]), float("nan"))
    Gemv(encoding).bind(encoding.alone(w), (w.shape[0], w.shape[1]))(x, out)
    return out


@pytest.mark.parametrize("which", ENCODINGS)
def test_the_product_equals_decode(which: str) -> None:
    encoding, w = ENCODINGS[which], random(63, 256)
    assert covers(encoding, (63, 256)) is None
    stored = encoding.decode(encoding.alone(w), (63, 256))
    for m in (1, 5):
        x = random(m, 256, seed=m)
        y = multiplied(encoding, w, x)
        assert off(y, x, stored) < TOLERANCE
        assert torch.equal(multiplied(encoding, w, x[-1:]), y[-1:])  # a row gets the same bits alone
    assert off(y, x, 1.05 * stored) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("which", "right", "wrong"),
    [
        ("three bits", "(const uint8_t*)w[6]", "(const uint8_t*)w[4]"),
        ("banks of tables", " * 8)", " * 4)"),
        ("two of four", "pick<4>(xs[b] + 4,", "pick<4>(xs[b] + 8,"),
        ("one of sixteen, with zeros", "fma(scale1,", "fma(1.05f * scale1,"),
        ("a sum", " == (int32_t)(", " == 1 + (int32_t)("),
    ],
)
def test_a_wrong_kernel_exceeds_the_tolerance(which: str, right: str, wrong: str) -> None:
    encoding, w, x = ENCODINGS[which], random(63, 256), random(3, 256, seed=1)
    stored = encoding.decode(encoding.alone(w), (63, 256))
    with mutant(right, wrong):
        y = multiplied(encoding, w, x)
    assert off(y, x, stored) > 100 * TOLERANCE


def test_what_no_kernel_reads_says_why() -> None:
    assert "depends on its whole row" in (covers(Rotated(Affine(8, 0)), (16, 64)) or "")
    assert "not known for any width" in (covers(Sparse(0.02), (16, 64)) or "")
    assert "do not divide" in (covers(Codebook(3, 8), (16, 64)) or "")
    with pytest.raises(SmeltError, match="gemv does not cover rotated"):
        Gemv(Rotated(Affine(8, 0))).bind(Rotated(Affine(8, 0)).alone(random(16, 64)), (16, 64))


def test_missing_bits_are_seen() -> None:
    encoding = Codebook(4, 8, shared=True)
    parts = encoding.alone(random(16, 64))
    with pytest.raises(SmeltError, match="the parts hold"):
        Gemv(encoding).bind({**parts, "book": parts["book"][:, :128]}, (16, 64))


def test_its_name_is_short() -> None:
    assert name(Nonuniform(4, kind="normal")) == "gemv.nonuniform4.normal"
