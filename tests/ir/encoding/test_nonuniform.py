"""Signposts: the optimum of a Gaussian as published, weighted fits, clipped ranges, and what Q-Norm restores."""

import pytest
import torch

from smelt.ir.encoding import Affine, Encoding, Nonuniform, signposts

from .examples import decibels


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def through(encoding: Encoding, x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    parts = encoding.alone(x, weight)
    return encoding.decode(parts, tuple(x.shape))


@pytest.mark.parametrize(("count", "error"), [(2, 0.3634), (4, 0.1175), (8, 0.03454), (16, 0.009497)])
def test_the_values_for_a_gaussian_have_the_error_that_max_gives(count: int, error: float) -> None:
    """J. Max, Quantizing for Minimum Distortion, 1960, table I."""
    values, x = torch.tensor(signposts.gaussian(count)), gaussian(1 << 18)
    found = (x - values[signposts.nearest(x, values).long()]).square().mean()
    assert abs(float(found) - error) < 0.02 * error
    assert torch.equal(values, -values.flip(0)) and values.diff().min() > 0


def test_a_fit_finds_the_same_values_from_samples() -> None:
    values = signposts.fitted(gaussian(1 << 18), None, 8)
    assert (values - torch.tensor(signposts.gaussian(8))).abs().max() < 0.05


def test_weights_move_values_to_what_counts() -> None:
    x = torch.linspace(-1, 1, 2001)
    weight = (x > 0.5).float() + 1e-4
    values = signposts.fitted(x, weight, 4)
    assert (values[-3:] > 0.5).all() and values.diff().min() > 0


def test_fewer_samples_than_values_are_kept_exactly() -> None:
    x = torch.tensor([0.3, -0.2])
    values = signposts.fitted(x, None, 8)
    assert torch.equal(values[signposts.nearest(x, values).long()], x)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_signposts_beat_even_steps_on_a_gaussian(bits: int) -> None:
    """At the same stored bits; even steps with a scale and zero for each row."""
    x = gaussian(256, 128)
    even = through(Affine(bits, 0, zero=True), x)
    for encoding in (Nonuniform(bits), Nonuniform(bits, kind="normal")):
        assert encoding.stored_bits((256, 128)) == Affine(bits, 0, zero=True).stored_bits((256, 128))
        assert decibels(x, through(encoding, x)) > decibels(x, even) + 0.25


def test_fisher_weights_lower_the_error_that_counts() -> None:
    x, weight = gaussian(512, 64), torch.ones(512, 64)
    weight[x.abs() < 1.5] = 1e-3
    plain, weighted = (through(Nonuniform(2), x, w) for w in (None, weight))
    counts = [float((weight * (x - y).square()).sum()) for y in (plain, weighted)]
    assert counts[1] < 0.8 * counts[0]
    by_row = through(Nonuniform(2), x, torch.ones(512))
    assert torch.equal(by_row, plain)


def test_clipping_leaves_extremes_out_of_the_range_alone() -> None:
    x = gaussian(1000, 64)
    x[::250] *= 30
    whole, clipped = (Nonuniform(3, axis="channel", range="calibrated", clip=clip) for clip in (0.0, 0.02))
    tables = clipped.fit(x)
    assert (tables["scale"].float() < 0.5 * whole.fit(x)["scale"].float()).all()
    inner = x.abs() < 3
    assert decibels(x[inner], through(clipped, x)[inner]) > decibels(x[inner], through(whole, x)[inner]) + 3
    assert through(clipped, x).abs().max() <= (tables["scale"] + tables["zero"].abs()).float().max() * 1.01


def test_q_norm_restores_mean_and_deviation() -> None:
    x = gaussian(512, 64).abs().sqrt()
    axis = {"axis": "channel", "range": "calibrated"}
    plain, normed = (through(Nonuniform(2, qnorm=q, **axis), x) for q in (False, True))  # type: ignore[arg-type]
    scale = x.std()
    assert abs(float(plain.std() - scale)) > 0.03 * scale
    assert abs(float(normed.std() - scale)) < 0.03 * scale and abs(float(normed.mean() - x.mean())) < 0.01 * scale


def test_ranges_of_channels_hold_for_data_that_was_not_seen() -> None:
    encoding, scales = Nonuniform(3, axis="channel", range="calibrated"), torch.logspace(-1, 1, 64)
    tables = encoding.fit(gaussian(512, 64) * scales)
    x = gaussian(64, 64, seed=1) * scales
    good = decibels(x, encoding.decode({**encoding.encode(x, tables), **tables}, (64, 64)))
    other = {**tables, "scale": tables["scale"].flip(0)}
    assert 13 < good < 16
    assert decibels(x, encoding.decode({**encoding.encode(x, other), **other}, (64, 64))) < 5
