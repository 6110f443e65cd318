"""The noise is a pure function of its key, uniform and independent where it should be, and draws from the right law."""

import math
from collections.abc import Callable

import pytest
import torch

from smelt.runtime import noise

CHI2_63 = 103.4  # the 0.999 quantiles of chi-square with 63 and with 7 degrees of freedom
CHI2_7 = 24.3
KS = 1.95  # of sqrt(n) times the Kolmogorov-Smirnov distance

# the rare token needs the far end of the noise
LAW = torch.tensor([0.30, 0.25, 0.16, 0.12, 0.08, 0.05, 0.0395, 0.0005])
Gumbel = Callable[[int, int, torch.Tensor, int], torch.Tensor]


def by_hand(seed: int, request: int, position: int, token: int) -> float:
    """The formula of the module's docstring in Python integers."""
    word = 2**64 - 1

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & word
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & word
        return x ^ (x >> 31)

    def after(state: int, value: int) -> int:
        return mix((state + 0x9E3779B97F4A7C15 * (value + 1)) & word)

    key = after(after(mix(seed & word), request), position)
    return ((after(key, token) >> 12) + 0.5) / 2**52


@pytest.mark.parametrize(
    "key", [(0, 0, 0, 0), (1, 2, 3, 4), (2**63 + 5, 7, 2047, 31999), (2**64 - 1, 2**40, 131072, 1)]
)
def test_follows_the_formula(key: tuple[int, int, int, int]) -> None:
    seed, request, position, token = key
    u = noise.uniform(seed, request, torch.tensor([position]), token + 1)[0, token]
    assert u == by_hand(*key)
    g = noise.gumbel(seed, request, torch.tensor([position]), token + 1)[0, token]
    assert g == torch.tensor(-math.log(-math.log(by_hand(*key))), dtype=torch.float32)


def test_stays_the_same_between_versions() -> None:
    """Whoever noted a seed wants the same text again: these values may never change."""
    u = noise.uniform(1234, 5, torch.tensor([6]), 3)[0]
    assert u.tolist() == [0.4237587306855316, 0.7788708559159468, 0.7824373283807168]


def test_value_is_the_same_in_every_batch() -> None:
    positions = torch.tensor([9, 3, 3, 700, 0, 9])
    together = noise.gumbel(1, 2, positions, 1000)
    assert together.shape == (6, 1000) and together.dtype == torch.float32
    for row, position in enumerate(positions):
        assert torch.equal(noise.gumbel(1, 2, position[None], 1000)[0], together[row])
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    assert torch.equal(noise.gumbel(1, 2, positions[order], 1000), together[order])
    assert torch.equal(noise.gumbel(1, 2, positions, 17), together[:, :17])
    assert torch.equal(noise.gumbel(1, 2, positions.to(torch.int32), 1000), together)


def test_value_is_the_same_for_chosen_ids() -> None:
    positions = torch.arange(4)
    ids = torch.tensor([[3, 999], [0, 1], [500, 2], [7, 7]])
    assert torch.equal(noise.gumbel(1, 2, positions, ids), noise.gumbel(1, 2, positions, 1000).gather(1, ids))


def test_rows_of_different_requests() -> None:
    requests = torch.tensor([8, 2, 8])
    together = noise.gumbel(1, requests, torch.tensor([4, 4, 5]), 100)
    for row, (request, position) in enumerate([(8, 4), (2, 4), (8, 5)]):
        assert torch.equal(noise.gumbel(1, request, torch.tensor([position]), 100)[0], together[row])


@pytest.mark.parametrize("word", [0, -1])
def test_is_finite_at_both_ends(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "_mix", lambda x: torch.full_like(x, word))
    u = noise.uniform(0, 0, torch.tensor([0]), 1)
    assert 0 < u < 1
    assert noise.gumbel(0, 0, torch.tensor([0]), 1).isfinite().all()


def ks_distance(u: torch.Tensor) -> float:
    u = u.flatten().sort().values
    steps = torch.arange(len(u) + 1, dtype=torch.float64) / len(u)
    return max(float((steps[1:] - u).max()), float((u - steps[:-1]).max())) * math.sqrt(len(u))


@pytest.mark.parametrize("seed", [0, 1, 2**62])
def test_is_uniform_along_ids_and_along_positions(seed: int) -> None:
    assert ks_distance(noise.uniform(seed, 0, torch.tensor([5]), 32000)) < KS
    assert ks_distance(noise.uniform(seed, 0, torch.arange(32000), 1)) < KS
    assert ks_distance(noise.uniform(seed, torch.arange(32000), torch.zeros(32000), 1)) < KS
    seeds = torch.cat([noise.uniform(seed + i, 0, torch.tensor([0]), 1) for i in range(2000)])
    assert ks_distance(seeds) < KS
    assert ks_distance(noise.uniform(seed, 0, torch.tensor([5]), 32000) ** 1.05) > KS


def joint_chi2(a: torch.Tensor, b: torch.Tensor) -> float:
    """Chi-square of an 8 x 8 table of pairs against the uniform law on the square."""
    cells = torch.bincount(((a * 8).long() * 8 + (b * 8).long()).flatten(), minlength=64)
    expected = a.numel() / 64
    return float(((cells - expected) ** 2 / expected).sum())


def test_different_keys_are_independent() -> None:
    at = torch.tensor([40])
    base = noise.uniform(1, 2, at, 32000)
    others = {
        "seed": noise.uniform(2, 2, at, 32000),
        "request": noise.uniform(1, 3, at, 32000),
        "position": noise.uniform(1, 2, at + 1, 32000),
        "swapped": noise.uniform(1, 40, at - 38, 32000),
        "next id": base.roll(1, dims=1),
    }
    for name, other in others.items():
        correlation = float(torch.corrcoef(torch.cat([base, other]))[0, 1])
        assert abs(correlation) < 4 / math.sqrt(32000), name
        assert joint_chi2(base, other) < CHI2_63, name
    assert joint_chi2(base, base) > CHI2_63, "a key that a factor does not enter must not pass"


def law_chi2(gumbel: Gumbel, count: int = 400_000) -> float:
    """How far argmax(log p + noise) over `count` positions is from the law p."""
    drawn = (LAW.log() + gumbel(11, 0, torch.arange(count), len(LAW))).argmax(dim=-1)
    expected = LAW * count
    return float(((torch.bincount(drawn, minlength=len(LAW)) - expected) ** 2 / expected).sum())


def test_draws_from_the_law() -> None:
    assert (
        law_chi2(lambda seed, request, positions, v: noise._gumbel(noise._keys(seed, request, positions), v)) < CHI2_7
    )


MUTANTS: dict[str, Gumbel] = {
    "keyed without position": lambda s, r, p, v: noise.gumbel(s, r, torch.zeros_like(p), v),
    "keyed without id": lambda s, r, p, v: noise._gumbel(noise._keys(s, r, p), 1).expand(-1, v),
    "exponential": lambda s, r, p, v: -noise.uniform(s, r, p, v).log(),
    "5 % too wide": lambda s, r, p, v: 1.05 * noise._gumbel(noise._keys(s, r, p), v),
    "8 bits": lambda s, r, p, v: -(-((noise.uniform(s, r, p, v) * 256).floor() / 256 + 1 / 512).log()).log(),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_law_rejects(mutant: str) -> None:
    assert law_chi2(MUTANTS[mutant]) > CHI2_7
