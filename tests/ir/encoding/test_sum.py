"""Sums: each term stores the error of those before it, outliers may be taken out first; and the terms alone."""

import torch

from smelt.ir.encoding import Affine, ChannelScaled, Encoding, LowRank, Nonuniform, Sign, Sparse, Sum

from .examples import decibels


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def through(encoding: Encoding, x: torch.Tensor) -> torch.Tensor:
    return encoding.decode(encoding.alone(x), tuple(x.shape))


def test_a_next_term_stores_the_error() -> None:
    x, first, second = gaussian(64, 64), Affine(4, 64), Affine(4, 64)
    whole = Sum((first, second))
    parts = whole.encode(x)
    assert set(parts) == {"a_codes", "a_scale", "b_codes", "b_scale"}
    rest = x - through(first, x)
    assert all(torch.equal(parts[f"b_{part}"], value) for part, value in second.encode(rest).items())
    assert decibels(x, through(whole, x)) > decibels(x, through(first, x)) + 16


def test_a_term_is_fitted_to_what_it_will_see() -> None:
    x = gaussian(1, 256, 64)
    whole = Sum((Affine(2, 64), Nonuniform(2, axis="channel", range="calibrated")))
    tables = whole.fit(x)
    assert set(tables) == {"b_scale", "b_zero", "b_table"}
    rest = x - through(whole.terms[0], x)
    wanted = whole.terms[1].fit(rest)
    assert all(torch.equal(tables[f"b_{part}"], value) for part, value in wanted.items())
    assert decibels(x, through(whole, x)) > decibels(x, through(whole.terms[0], x)) + 6


def test_outliers_that_go_first_do_not_widen_the_range() -> None:
    x = gaussian(64, 128)
    x[::8, 3], x[::8, 77] = 40, -60
    given, first = (Sum((Affine(2, 0, zero=True), Sparse(2)), order) for order in ("given", "outliers"))
    assert given.stored_bits((64, 128)) == first.stored_bits((64, 128))
    rows = x[::8]
    assert decibels(rows, through(first, x)[::8]) > decibels(rows, through(given, x)[::8]) + 10
    y = through(first, x)
    assert (y[::8, 3] - 40).abs().max() < 0.1 and (y[::8, 77] + 60).abs().max() < 0.1
    keys = x.mT
    by_channel = Sum((Affine(2, 128, "channel", True), Sparse(2, axis="channel")), "outliers")
    assert (through(by_channel, keys.reshape(128, 64)).mT[::8, 3] - 40).abs().max() < 0.1


def test_a_sparse_term_knows_its_entries() -> None:
    x = torch.tensor([[1.0, -5, 2, 7, 0, 0, 0, 0]]).repeat(2, 1)
    assert Sparse(2).encode(x)["index"].tolist() == [[1, 3]] * 2
    assert Sparse(2).encode(x)["value"].tolist() == [[-5, 7]] * 2
    assert Sparse(3, "magnitude").encode(x)["index"].tolist() == [[1, 2, 3]] * 2
    assert Sparse(0.3).count(8) == 2 and Sparse(0.02).count(128) == 2 and Sparse(0.05, "magnitude").count(64) == 3
    columns = Sparse(1, "magnitude", axis="channel").encode(x.mT.reshape(8, 2))
    assert columns["index"].tolist() == [[3, 3]] and columns["value"].tolist() == [[7, 7]]
    assert "tell the 300 entries of dim -1 apart; use index: int16" in (Sparse(2).refuses((4, 300)) or "")
    assert Sparse(2, index="int16").refuses((4, 300)) is None and "less than the 6" in (Sparse(6).refuses((4, 5)) or "")


def test_low_rank_is_nearly_the_best_there_is() -> None:
    x = gaussian(128, 4) @ gaussian(4, 64, seed=1) + 0.3 * gaussian(128, 64, seed=2)
    left, values, right = torch.linalg.svd(x)
    best = decibels(x, (left[:, :4] * values[:4]) @ right[:4])
    assert best - 0.2 < decibels(x, through(LowRank(4), x)) <= best + 0.01
    assert decibels(x, through(LowRank(3), x)) < best - 1
    assert torch.equal(through(LowRank(2), x), through(LowRank(2), x))


def test_factors_of_few_bits_cost_little_where_codes_come_after_them() -> None:
    x = 3 * gaussian(64, 2) @ gaussian(2, 64, seed=1) + gaussian(64, 64, seed=2)
    codes, fine, coarse = Affine(3, 64, zero=True), LowRank(2), LowRank(2, factors=Affine(4, 0))
    first = [decibels(x, through(Sum((low, codes)), x)) for low in (fine, coarse)]
    assert first[0] - first[1] < 2.5 and 3 * coarse.stored_bits((64, 64)) < fine.stored_bits((64, 64))
    # rounding leaves no structure: two directions of 64 are a thirtieth of it
    after = decibels(x, through(Sum((codes, fine)), x))
    assert after - decibels(x, through(codes, x)) < 1.5 and min(first) > after + 6
    reasons = LowRank(2, factors=Affine(4, 0)).refuses((48, 64)), Sparse(2, values=Affine(8, 7)).refuses((64, 64))
    assert "its factors, affine(bits=4" in (reasons[0] or "") and "its values, affine(bits=8" in (reasons[1] or "")


def test_the_left_factor_is_fitted_to_the_right_one_as_it_was_rounded() -> None:
    x, factors = gaussian(64, 3) @ gaussian(3, 64, seed=1), Affine(3, 0)
    low = LowRank(3, factors=factors)
    parts = low.encode(x)
    right = factors.decode({part[6:]: held for part, held in parts.items() if part.startswith("right")}, (3, 64))
    best = x @ torch.linalg.pinv(right)
    held = {part[5:]: held for part, held in parts.items() if part.startswith("left_")}
    assert torch.equal(held["codes"], factors.encode(best.mT.contiguous())["codes"])
    naive = factors.encode((x @ right.mT).mT.contiguous())
    assert not torch.equal(held["scale"], naive["scale"])


def test_low_rank_of_great_and_small_numbers_is_finite() -> None:
    x = gaussian(64, 4) @ gaussian(4, 64, seed=1)
    for size in (1e3, 1e-6):
        y = through(LowRank(4), x * size)
        assert y.isfinite().all() and (size < 1 or decibels(x * size, y) > 50)
    assert torch.equal(through(LowRank(2), torch.zeros(64, 64)), torch.zeros(64, 64))


def test_signs_have_the_least_error_or_none_on_average() -> None:
    x, q = gaussian(4096, 64), gaussian(64, 1, seed=1)
    least, unbiased = (through(Sign(unbiased=u), x) for u in (False, True))
    assert abs(decibels(x, least) - 4.39) < 0.3  # 1 - 2 / π of a Gaussian stays
    products = x @ q
    slopes = [float((y @ q * products).sum() / products.square().sum()) for y in (least, unbiased)]
    assert abs(slopes[0] - 2 / torch.pi) < 0.03 and abs(slopes[1] - 1) < 0.04


def test_scaled_channels_do_with_one_scale_a_row() -> None:
    x = gaussian(256, 128)
    x[:, ::16] *= 20
    plain, scaled = Affine(4, 0, zero=True), ChannelScaled(Affine(4, 0, zero=True))
    quiet = torch.ones(128, dtype=torch.bool)
    quiet[::16] = False
    gains = [decibels(x[:, quiet], through(e, x)[:, quiet]) for e in (plain, scaled)]
    assert gains[1] > gains[0] + 6
    dead = x.clone()
    dead[:, 7] = 0
    assert through(scaled, dead)[:, 7].abs().max() < 0.05
