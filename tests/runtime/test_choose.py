"""Draws follow the law, no row feels another, ties go to the lowest id, and broken logits are refused."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from smelt.ir.errors import SmeltError
from smelt.runtime import noise, sampling
from smelt.runtime.sampling import Context, Sampling, choose, choose_with_margin

CHI2_7 = 24.3  # the 0.999 quantile of chi-square with 7 degrees of freedom

SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
    {"temperature": 2.0, "min_p": 0.1, "typical_p": 0.6},
    {"temperature": 0.6, "top_k": 40, "top_p": 0.95, "min_p": 0.02, "typical_p": 0.9, "repetition_penalty": 1.3},
    {"temperature": 0.0, "repetition_penalty": 1.5},
]


def logits(rows: int, vocabulary: int, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def test_greedy_takes_the_lowest_of_tied_ids() -> None:
    x = torch.zeros(3, 5000)
    x[1, [4000, 17, 4999]] = 2.0
    x[2, 4999] = 1e-6
    token, margin = choose_with_margin(x, Sampling(), 0, torch.arange(3))
    assert token.tolist() == [0, 17, 4999] and token.dtype == torch.int64
    assert margin.tolist() == pytest.approx([0, 0, 1e-6])


@pytest.mark.parametrize("kept", [2, 100])
def test_sampling_takes_the_lowest_of_tied_ids(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "gumbel", lambda s, r, p, v: torch.zeros(()))
    x = torch.full((1, 100), -math.inf)
    x[0, 100 - kept :] = 1.0
    assert choose(x, Sampling(temperature=1.0), 0, torch.tensor([0])) == 100 - kept


def test_a_common_offset_does_not_blur_the_noise() -> None:
    """At 2^20 float32 has steps of 1/8: noise added there would tie all the time."""
    x, settings, at = (logits(200, 16) * 8).round() / 8, Sampling(temperature=1.0), torch.arange(200)
    assert torch.equal(choose(x + 2**20, settings, 0, at), choose(x, settings, 0, at))


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_rows_alone_choose_as_rows_together(options: dict[str, Any]) -> None:
    settings = Sampling(seed=3, **options)
    # rows with very different numbers of tokens left, so that batches take other ways through the warpers than rows
    x = torch.cat([logits(5, 5000, 6.0), logits(5, 5000, 0.1), logits(5, 5000, 30.0)])
    positions = torch.tensor([4, 5, 5, 6, 6] * 3)
    paths = torch.arange(45).reshape(15, 3)
    seen = torch.arange(5000) % 7 == 0
    together = settings.process(x, Context(seen, paths))
    token, margin = choose_with_margin(together, settings, 1, positions)
    assert torch.equal(choose(together, settings, 1, positions), token)
    for row in range(len(x)):
        one = slice(row, row + 1)
        alone = settings.process(x[one], Context(seen, paths[one]))
        assert torch.equal(alone, together[one])
        alone_token, alone_margin = choose_with_margin(alone, settings, 1, positions[one])
        assert alone_token == token[row] and alone_margin == margin[row]


@given(
    kept=st.integers(1, 64),
    seed=st.integers(0, 2**64 - 1),
    request=st.integers(0, 2**40),
    position=st.integers(0, 2**20),
)
def test_choice_is_the_argmax_of_law_plus_noise(kept: int, seed: int, request: int, position: int) -> None:
    """Also where few tokens are left and the noise is drawn for them alone."""
    x = sampling.keep_top_k(logits(3, 64, seed=seed % 1000), kept)
    positions = position + torch.arange(3)
    score = x.double().log_softmax(-1) + noise.gumbel(seed, request, positions, 64)
    token, margin = choose_with_margin(x, Sampling(temperature=1.0, seed=seed), request, positions)
    assert torch.equal(token, score.argmax(-1))
    best = score.topk(2).values
    assert torch.allclose(margin.double(), best[:, 0] - best[:, 1], atol=1e-5)


def test_margin_is_infinite_where_one_token_is_left() -> None:
    for x in (torch.zeros(1, 1), torch.tensor([[1.0, -math.inf]]), torch.tensor([[-math.inf] * 50 + [0.0]])):
        for settings in (Sampling(), Sampling(temperature=1.0)):
            assert choose_with_margin(x, settings, 0, torch.tensor([0]))[1] == math.inf


def test_the_margin_bounds_what_may_move() -> None:
    x, settings, at = logits(50, 100), Sampling(temperature=1.0), torch.arange(50)
    token, margin = choose_with_margin(x, settings, 0, at)
    push = torch.where(F.one_hot(token, 100).bool(), -1.0, 1.0) * margin[:, None]
    assert torch.equal(choose(x + 0.49 * push, settings, 0, at), token)
    assert (choose(x + 0.51 * push, settings, 0, at) != token).all()


LAW = torch.tensor([0.30, 0.25, 0.15, 0.12, 0.08, 0.05, 0.04, 0.01])


def chi2(law: torch.Tensor, settings: Sampling, request: int = 0, count: int = 100_000) -> float:
    """How far the tokens chosen at `count` positions are from `law`; tokens beyond the law count as infinitely far."""
    processed = settings.process(LAW.log()[None]).expand(count, -1)
    drawn = torch.bincount(choose(processed, settings, request, torch.arange(count)), minlength=len(law)).double()
    if (drawn[law == 0] > 0).any():
        return math.inf
    expected = law[law > 0].double() * count
    return float(((drawn[law > 0] - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(
    ("settings", "law"),
    [
        (Sampling(temperature=1.0, seed=1), LAW),
        (Sampling(temperature=0.5, seed=2), LAW**2 / (LAW**2).sum()),
        (Sampling(temperature=1.0, top_k=3, seed=3), F.pad(LAW[:3] / LAW[:3].sum(), (0, 5))),
        (Sampling(temperature=1.0, top_p=0.6, seed=4), F.pad(LAW[:3] / LAW[:3].sum(), (0, 5))),
        (Sampling(temperature=1.0, min_p=0.5, seed=5), F.pad(LAW[:3] / LAW[:3].sum(), (0, 5))),
    ],
    ids=["plain", "temperature", "top_k", "top_p", "min_p"],
)
def test_tokens_follow_the_law(settings: Sampling, law: torch.Tensor) -> None:
    assert chi2(law, settings) < CHI2_7
    other = Sampling(temperature=settings.temperature * 1.05, top_k=settings.top_k, seed=settings.seed)
    assert chi2(law, other) > CHI2_7, "a law that is 5 % too warm, or lacks the warper, must be seen"


def test_the_law_sees_noise_that_forgets_the_position(monkeypatch: pytest.MonkeyPatch) -> None:
    gumbel = noise.gumbel
    monkeypatch.setattr(noise, "gumbel", lambda s, r, p, v: gumbel(s, r, torch.zeros_like(p), v))
    assert chi2(LAW, Sampling(temperature=1.0)) > CHI2_7


def test_seeds_and_requests_draw_differently() -> None:
    x, at = torch.zeros(200, 8), torch.arange(200)
    draws = [choose(x, Sampling(temperature=1.0, seed=s), r, at) for s, r in ((0, 0), (1, 0), (0, 1), (0, 0))]
    assert torch.equal(draws[0], draws[3])
    for other in draws[1:3]:
        assert 5 < int((draws[0] == other).sum()) < 60  # 25 expected by chance


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("fault", ["one nan", "all nan", "inf", "nothing allowed"])
def test_logits_without_a_choice_are_refused(temperature: float, fault: str) -> None:
    x = logits(3, 100)
    x[1] = {"one nan": x[1], "all nan": math.nan, "inf": x[1], "nothing allowed": -math.inf}[fault]
    if fault in ("one nan", "inf"):
        x[1, 40] = math.nan if fault == "one nan" else math.inf
    for warpers in ({}, {"top_k": 5, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.9}):
        settings = Sampling(temperature=temperature, **warpers)  # type: ignore[arg-type]
        with pytest.raises(SmeltError, match="row 1 of the logits, position 31"):
            choose(settings.process(x), settings, 0, torch.tensor([30, 31, 32]))
