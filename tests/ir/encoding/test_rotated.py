"""Rotations: orthogonal, the same every time, undone by decode, and foldable into a query."""

import pytest
import torch

from smelt.ir.encoding import Affine, Dense, Encoding, Nonuniform, Rotated, Sign, Sum

from .examples import decibels

TURNS = ["hadamard", "signs", "orthogonal"]
TURBO = Rotated(Nonuniform(3, kind="normal", zero=False), "orthogonal")


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("by", TURNS)
def test_a_rotation_is_orthogonal_and_undone(by: str) -> None:
    encoding = Rotated(Dense("float32"), by, seed=7)
    turn = encoding.rotation(64)
    assert torch.allclose(turn @ turn.mT, torch.eye(64), atol=1e-6)
    assert torch.equal(turn, Rotated(Dense("float16"), by, seed=7).rotation(64))
    x = gaussian(2, 8, 64)
    assert torch.allclose(encoding.decode(encoding.encode(x), (2, 8, 64)), x, atol=1e-5)
    assert (encoding.encode(x)["data"] - x).abs().max() > 0.5
    if by != "hadamard":
        assert not torch.equal(turn, Rotated(Dense("float32"), by, seed=8).rotation(64))


@pytest.mark.parametrize("by", TURNS)
def test_a_reader_may_turn_the_query_instead(by: str) -> None:
    encoding, q, x = Rotated(Affine(8, 0), by), gaussian(4, 64), gaussian(32, 64, seed=1)
    parts, turn = encoding.encode(x), encoding.rotation(64)
    inner = encoding.inner.decode(parts, (32, 64))
    scores = q @ encoding.decode(parts, (32, 64)).mT
    assert torch.allclose((q @ turn.mT) @ inner.mT, scores, atol=1e-4)
    assert not torch.allclose((q @ turn) @ inner.mT, scores, atol=1e-1) or by == "hadamard"  # which is symmetric
    weights = torch.softmax(scores, -1)
    assert torch.allclose((weights @ inner) @ turn, weights @ encoding.decode(parts, (32, 64)), atol=1e-5)


def test_outlier_channels_are_spread() -> None:
    x = gaussian(256, 64)
    x[:, 3] *= 30
    plain, turned = Affine(4, 0, zero=True), Rotated(Affine(4, 0, zero=True))
    quiet = torch.arange(64) != 3
    found = [e.decode(e.encode(x), (256, 64))[:, quiet] for e in (plain, turned)]
    assert decibels(x[:, quiet], found[1]) > decibels(x[:, quiet], found[0]) + 3


def test_any_rows_have_the_error_of_a_gaussian() -> None:
    """The bound of TurboQuant does not depend on the data: three bits leave 3.45 % of rows of any kind."""
    for x in (gaussian(512, 128), gaussian(512, 128).abs() ** 3, torch.eye(128) * 5):
        y = TURBO.decode(TURBO.encode(x), tuple(x.shape))
        assert 13.8 < decibels(x, y) < 16


def test_a_second_stage_makes_products_right_on_average() -> None:
    x = gaussian(64, 128)
    coarse = Nonuniform(2, kind="normal", zero=False)
    slopes = []
    for two in (False, True):
        mean = torch.zeros(64, 128)
        for seed in range(64):
            whole: Encoding = Rotated(coarse, "orthogonal", seed)
            whole = Sum((whole, Rotated(Sign(unbiased=True), "orthogonal", 100 + seed))) if two else whole
            mean += whole.decode(whole.encode(x), (64, 128)) / 64
        slopes.append(float((mean * x).sum() / x.square().sum()))
    assert slopes[0] < 0.9 and abs(slopes[1] - 1) < 0.02


def test_dims_without_a_hadamard_matrix_are_refused() -> None:
    assert "80, is no power of two; use by: orthogonal" in (Rotated(Affine(8, 0)).refuses((4, 80)) or "")
    assert Rotated(Affine(8, 0), "orthogonal").refuses((4, 80)) is None
    assert "its inner affine" in (Rotated(Affine(4, 0)).refuses((4, 16)) or "")
