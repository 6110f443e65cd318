"""HyperAttention's meaning: exact where it reads all, unbiased where it samples, better where it reads more."""

import math
from collections.abc import Callable

import pytest
import torch

from smelt.ir.cache import hyper
from smelt.ir.cache.hyper import Hyper, Rectangle, buckets, hyper_attend, levels, planes, sample, starts
from smelt.ir.errors import SmeltError

SMALL = Hyper(block=16, sample=16, projections=6, min_seq_len=32, sink=2)
TOLERANCE = 3e-6  # float32
SEEDS = 400


def prompt(tokens: int, seed: int = 0, heads: int = 2, dim: int = 32) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(seed)
    shapes = (heads, tokens, dim), (heads // 2, tokens, dim), (heads // 2, tokens, 24)
    return tuple(torch.randn(shape, generator=random) for shape in shapes)


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float = 0.2) -> torch.Tensor:
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=scale)[0]


def error(options: Hyper, inputs: tuple[torch.Tensor, ...], seeds: int = 1) -> float:
    """The error's norm relative to the exact result's, over some seeds."""
    want = exact(*inputs)
    off = [(hyper_attend(*inputs, 0.2, options, seed) - want).square().sum() for seed in range(seeds)]
    return math.sqrt(sum(map(float, off)) / seeds / float(want.square().sum()))


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 47, 48, 64, 65, 127, 129, 200, 333])
def test_a_sample_of_all_keys_is_exact(tokens):
    """Whatever the length: no key is left out, and none counts twice."""
    inputs = prompt(tokens)
    everything = Hyper(block=16, sample=tokens, projections=6, min_seq_len=32, sink=2)
    assert bool(levels(tokens, everything)) == (tokens > 32)
    assert (hyper_attend(*inputs, 0.2, everything) - exact(*inputs)).abs().max() < TOLERANCE


def test_one_block_of_all_keys_is_exact():
    inputs = prompt(200)
    assert error(Hyper(block=200, sample=1, min_seq_len=200), inputs) < TOLERANCE
    wide = Hyper(block=104, sample=1, projections=4, min_seq_len=104)  # a rectangle of one block
    assert len(levels(200, wide)) == 1 and error(wide, inputs) < TOLERANCE


def test_short_prompts_are_exact():
    inputs = prompt(96)
    assert not levels(96, Hyper(block=16, sample=1, min_seq_len=96))
    assert error(Hyper(block=16, sample=1, min_seq_len=96), inputs) < TOLERANCE
    assert error(Hyper(block=16, sample=1, min_seq_len=95), inputs) > 0.01


def test_constant_values_stay():
    q, k, v = prompt(300)
    assert (hyper_attend(q, k, torch.ones_like(v), 0.2, SMALL) - 1).abs().max() < TOLERANCE


RECTANGLE = Rectangle(2, 115, 200)


def unbiased(rectangle: Rectangle = RECTANGLE) -> bool:
    """Whether a key of a block weighs 1 in it, and any other 1 in the mean over seeds: 113 keys, blocks of 16 and 1."""
    keys = torch.arange(rectangle.first, rectangle.middle).flip(0)
    weights = torch.zeros(rectangle.blocks(SMALL), rectangle.middle)
    for seed in range(SEEDS):
        for block, (_, seen, bias) in enumerate(hyper._blocks(rectangle, keys, SMALL, seed, head=1)):
            weights[block].index_add_(0, seen, bias.exp() / SEEDS)
    off = (weights[:, rectangle.first :] - 1).abs()
    own = torch.arange(113).flip(0)[None] // 16 == torch.arange(8)[:, None]
    noise = math.sqrt(113 / 16 / SEEDS)  # a weight of 113 / 16 that comes with probability 16 / 113
    whole = weights.sum(1) - 113  # the weights of each draw add up to the keys
    return bool(off[own].max() < 1e-5 and off[~own].max() < 5 * noise and whole.abs().max() < 1e-3)


def test_every_key_weighs_one_in_the_mean():
    assert unbiased()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("log", lambda x: 0.0),  # forgets ln(outside / m)
        ("sample", lambda outside, *rest: sample(outside, *rest) % 16),  # draws from the first block alone
        ("sample", lambda outside, *rest: sample(outside, *rest)[1:]),  # never draws some
    ],
)
def test_biased_samples_are_found(monkeypatch, name, wrong):
    monkeypatch.setattr(hyper.math if name == "log" else hyper, name, wrong)
    assert not unbiased()


def test_forgetting_the_logarithm_is_worse(monkeypatch):
    """What is far weighs too little then: the values of the older half are 1, those of the newer 0."""
    q, k, _ = prompt(512)
    inputs = q, k, (torch.arange(512) < 256).float().expand(1, -1)[..., None]
    right = error(SMALL, inputs, 3)
    monkeypatch.setattr(hyper.math, "log", lambda x: 0.0)
    assert right < 0.15 and error(SMALL, inputs, 3) > 2 * right


@pytest.mark.parametrize("grown", ["block", "sample"])
def test_the_error_falls_with_blocks_and_samples(grown):
    inputs = prompt(1024)
    sizes = ({"block": 16, "sample": 16} | {grown: size} for size in (16, 64, 256))
    errors = [error(Hyper(**size, projections=6, min_seq_len=256, sink=2), inputs) for size in sizes]
    assert errors[0] > 1.2 * errors[1] > 1.2 * 1.2 * errors[2] > 0


def test_the_hash_finds_large_logits(monkeypatch):
    """Every query of the second half has one far key that it agrees with; blocks of any other order miss it."""
    q, k, v = prompt(1024, dim=64)
    far = torch.randperm(512, generator=torch.Generator().manual_seed(1))
    q[:, 512:] = 8 * k[:, far] + 0.3 * q[:, 512:]
    options = Hyper(block=64, sample=64, projections=6, min_seq_len=512)
    found = error(options, (q, k, v))
    monkeypatch.setattr(hyper, "buckets", lambda x, normals: torch.rand(x.shape[:-1]))
    assert found < 0.7 * error(options, (q, k, v))


def test_first_and_nearest_tokens_are_exact():
    q, k, v = prompt(400)
    k[:, 1] = 4 * q.mean(1)[:1] + 2
    q += 2
    assert error(SMALL, (q, k, v)) < 1e-4  # the second token takes all weight
    assert error(Hyper(16, 16, 6, 32, sink=1), (q, k, v)) > 0.05
    q, k, v = prompt(400)
    q[0, 16:], q[1, 16:] = 8 * k[0, :-16], 8 * k[0, 1:-15]  # 16 and 15 tokens back
    assert error(SMALL, (q, k, v)) < 1e-3


def test_ranges_start_a_block_in_front():
    first = starts(300, SMALL)
    assert len(first) == 19 and first[:5] == [0, 0, 16, 32, 48]
    assert all(start <= max(0, 16 * (i - 1)) for i, start in enumerate(first))


def test_the_same_seed_draws_the_same():
    inputs = prompt(200)
    one, again, other = (hyper_attend(*inputs, 0.2, SMALL, seed) for seed in (3, 3, 4))
    assert torch.equal(one, again) and not torch.equal(one, other)
    seeded = Hyper(16, 16, 6, 32, 2, seed=1)
    assert not torch.equal(one, hyper_attend(*inputs, 0.2, seeded, 3))


def test_neighbouring_buckets_differ_in_one_sign():
    normals = planes(Hyper(projections=5), 5, 0)
    signs = torch.tensor([[1.0 if code >> bit & 1 else -1.0 for bit in range(5)] for code in range(32)])
    places = buckets(signs @ torch.linalg.pinv(normals).T, normals)
    assert sorted(places.tolist()) == list(range(32))
    ordered = signs[places.argsort()]
    assert ((ordered[1:] != ordered[:-1]).sum(1) == 1).all()


def test_normals_are_normal():
    normals = planes(Hyper(projections=12), 4096, 0)
    assert abs(float(normals.mean())) < 0.02 and abs(float(normals.std()) - 1) < 0.02
    assert float(normals.abs().max()) > 3.5 and normals.isfinite().all()


REFUSED: list[tuple[Callable[[], Hyper], str]] = [
    (lambda: Hyper(block=0), "block counts 1 to 1024 tokens, not 0"),
    (lambda: Hyper(sample=0), "a sample of 0 keys cannot stand for the others: it needs at least 1"),
    (lambda: Hyper(projections=13), "projections counts 1 to 12 bits, not 13"),
    (lambda: Hyper(min_seq_len=255), "min_seq_len 255 is below one block of 256: raise it, or lower block"),
    (lambda: Hyper(sink=256), "sink counts 0 to 255 tokens, fewer than a block, not 256"),
]


@pytest.mark.parametrize(("make", "reason"), REFUSED)
def test_options_that_cannot_be(make, reason):
    with pytest.raises(SmeltError, match=reason):
        make()
