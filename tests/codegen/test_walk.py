"""Weights that are walked: products and lookups equal those of dense bfloat16 to the bit, on every kind of CPU."""

import platform

import pytest
import torch

from smelt.codegen.gather import gather_kernel
from smelt.codegen.gemv import Gemv
from smelt.codegen.rows import RowKernel
from smelt.ir.encoding import Dense, Tiered
from smelt.ir.weight import Weight

from .mutants import mutant

MARCHES = ["native"] + (["x86-64-v3"] if platform.machine() == "x86_64" else [])
every_march = pytest.mark.parametrize("march", MARCHES)
SHAPES = [((1, 4), False), ((63, 192), False), ((33, 260), True)]  # and whether with all exponents


def matrix(shape: tuple[int, int], wide: bool = False) -> torch.Tensor:
    """Gaussian, or with every exponent that is no overflow in a sum."""
    random = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=random)
    return (values * 2.0 ** torch.randint(-140, 40, shape, generator=random) if wide else values).bfloat16()


def product(weight: Weight, x: torch.Tensor) -> torch.Tensor:
    out = torch.full((x.shape[0], weight.shape[0]), float("nan"))
    Gemv(weight.encoding).bind(weight.parts, weight.shape)(x, out)
    return out


def coded(w: torch.Tensor) -> Weight:
    return Weight(tuple(w.shape), *Tiered.coded(w))


def row(weight: Weight, ids: torch.Tensor) -> torch.Tensor:
    kernel = gather_kernel(weight)
    assert isinstance(kernel, RowKernel)
    out = torch.full((*ids.shape, weight.shape[1]), float("nan"))
    kernel.bind({"ids": ids, "weight": weight}, out)()
    return out


@every_march
def test_equals_dense_bfloat16_to_the_bit(monkeypatch: pytest.MonkeyPatch, march: str) -> None:
    monkeypatch.setenv("SMELT_MARCH", march)
    for shape, wide in SHAPES:
        w = matrix(shape, wide)
        dense = Weight(shape, Dense("bfloat16"), {"data": w})
        for m in (1, 3, 9):
            x = torch.randn(m, shape[1], generator=torch.Generator().manual_seed(m))
            assert torch.equal(product(coded(w), x), product(dense, x)), (shape, m)
        ids = torch.arange(shape[0]).flip(0)
        assert torch.equal(row(coded(w), ids), w.float()[ids])


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("low(low + tile * columns * 16)", "low(low)"),
        ("first(first + tile * columns * 4)", "first(first)"),
        ("at(start[2 * tile])", "at(0)"),
        ("rest + start[2 * tile + 1]", "rest"),
    ],
)
def test_a_walk_that_errs_is_caught(right: str, wrong: str) -> None:
    w = matrix((63, 192))
    x, ids = torch.randn(1, 192, generator=torch.Generator().manual_seed(1)), torch.arange(63)
    dense = product(Weight((63, 192), Dense("bfloat16"), {"data": w}), x)
    with mutant(right, wrong):
        assert not torch.equal(product(coded(w), x), dense) and not torch.equal(row(coded(w), ids), w.float())


def test_gpus_say_that_they_cannot() -> None:
    chains, nodes = (pytest.importorskip(f"smelt.codegen.{name}_triton") for name in ("chains", "nodes"))
    weight = coded(matrix((63, 192)))
    for reason in (chains.covers(weight.encoding, weight.shape), nodes.gather_refuses(weight)):
        assert "in the order in which they are stored, by kernels for CPUs" in reason
