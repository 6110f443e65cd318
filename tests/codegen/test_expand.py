"""Sparse weights that are walked by their bits: products equal those of dense ones to the bit, on every kind of CPU."""

import platform

import pytest
import torch

from smelt.codegen.gemv import Gemv
from smelt.ir.encoding import Bitmap, Dense
from smelt.ir.weight import Weight

from .mutants import mutant

MARCHES = ["native"] + (["x86-64-v3"] if platform.machine() == "x86_64" else [])


def product(weight: Weight, x: torch.Tensor) -> torch.Tensor:
    out = torch.full((x.shape[0], weight.shape[0]), float("nan"))
    Gemv(weight.encoding).bind(weight.parts, weight.shape)(x, out)
    return out


def pair(shape: tuple[int, int], dtype: str) -> tuple[Weight, Weight]:
    """Half of a matrix, coded and dense."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    w[w.abs() < 0.6745] = 0
    return Weight(shape, *Bitmap(dtype).coded(w)), Weight(shape, Dense(dtype), {"data": w})


@pytest.mark.parametrize("march", MARCHES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_equals_dense_to_the_bit(monkeypatch: pytest.MonkeyPatch, march: str, dtype: str) -> None:
    monkeypatch.setenv("SMELT_MARCH", march)
    for shape in ((1, 4), (63, 192)):
        sparse, dense = pair(shape, dtype)
        for m in (1, 5):
            x = torch.randn(m, shape[1], generator=torch.Generator().manual_seed(m))
            assert torch.equal(product(sparse, x), product(dense, x)), (shape, m)


def test_a_wrong_walk_is_seen() -> None:
    sparse, dense = pair((33, 64), "float16")
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    with mutant("value(value + start[tile])", "value(value)"):
        wrong = product(sparse, x)
    assert torch.equal(wrong[:, :16], product(dense, x)[:, :16])  # the first tile begins there
    assert not torch.allclose(wrong[:, 16:], product(dense, x)[:, 16:], atol=0.1)
