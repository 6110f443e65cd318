"""cache.estimate: sites as planned, a loss that more samples make smaller, and what it refuses."""

from dataclasses import replace

import pytest

from smelt.ir.cache import CachePlan
from smelt.ir.cache import Estimate as Option
from smelt.ir.encoding import parse
from smelt.ir.errors import SmeltError
from smelt.passes.cache.encode import Encode
from smelt.passes.cache.estimate import Estimate
from smelt.passes.measure import compare, replay


def test_sites_that_are_not_skipped_are_estimated(cached):
    before = cached.cache
    step = Estimate(8, 4, 2, mix=0.25, seed=5, sink=2, tail=8, page=16, skip_layers=(0,))
    assert not list(step.requires(cached))
    outcome = step.apply(cached, None)
    assert outcome.done == ("layer 1",) and outcome.skipped == {"layer 0": "named in skip_layers"}
    made = replace(before[1], sink=2, tail=8, page=16, estimate=Option(8, 4, 2, 0.5, 0.25, 5))
    assert cached.cache == CachePlan((before[0], made)) and cached.touched >= {"cache"}
    assert "already estimated" in next(step.requires(cached))


def test_more_samples_lose_less_and_all_lose_nothing(cached, tokens):
    tokens = tokens(2, 100)
    exact = replay(cached, tokens, 80, 1)
    lost = []
    for many in (4, 24, 200):
        made = cached.fork()
        Estimate(many, many, radius=0.0, sink=2, tail=8, page=16).apply(made, None)
        lost.append(compare(exact, replay(made, tokens, 80, 1)).kl)
    assert lost[0] > 1.5 * lost[1] > 0 and lost[2] < 1e-6


def test_refusals_name_the_layer_and_the_way_out(cached):
    assert "skip_layers names layer 7" in next(Estimate(skip_layers=(7,)).requires(cached))
    assert "leaves none of the layers" in next(Estimate(skip_layers=(0, 1)).requires(cached))
    Encode(values=parse("affine(bits=4, group=32)")).apply(cached, None)
    assert "cache.encode acts on tokens that stand for themselves" in next(Estimate().requires(cached))
    with pytest.raises(SmeltError, match="mix is a power of two"):
        Estimate(mix=0.3)
