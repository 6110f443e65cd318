"""attention.hyper: which layers it changes, what that costs, what it leaves alone and refuses."""

from dataclasses import replace

import pytest
import torch

from smelt.ir import cache
from smelt.ir.cache import CachePlan, Score, Select
from smelt.ir.errors import SmeltError
from smelt.ir.ops import CACHED_ATTENTION
from smelt.ir.program import Program
from smelt.passes.attention.hyper import Hyper
from smelt.passes.measure import compare, replay

SMALL = {"block": 16, "sample": 16, "projections": 6, "min_seq_len": 32}
OPTIONS = cache.Hyper(16, 16, 6, 32)


def with_sites(program: Program, **changes: object) -> Program:
    program.cache = CachePlan(tuple(replace(site, **changes) for site in program.cache.sites))
    return program


def test_the_last_layers_come_first(cached):
    before = cached.cache
    outcome = Hyper(layers=1, **SMALL).apply(cached, None)
    assert outcome.done == ("layer 1",) and outcome.skipped == {"layer 0": "not among the last 1 layers"}
    assert cached.cache == CachePlan((before[0], replace(before[1], hyper=OPTIONS)))
    assert cached.touched >= {"cache"} and not outcome.notes


def test_the_defaults_are_the_papers(cached):
    outcome = Hyper().apply(cached, None)
    assert cached.cache[0].hyper == cache.Hyper(block=256, sample=256, projections=8, min_seq_len=2048)
    assert outcome.done == ("layer 0", "layer 1")
    assert outcome.notes == {"min_seq_len": "no prompt is longer: the context is 256"}


def test_plans_are_written_and_read(cached):
    Hyper(**SMALL, seed=3).apply(cached, None)
    assert CachePlan.from_dict(cached.cache.to_dict()) == cached.cache


def test_more_layers_and_fewer_samples_cost_more(cached, tokens):
    ids = tokens(2, 200)
    exact = replay(cached, ids, 190)
    kls = []
    for layers, sample in ((None, 200), (None, 64), (None, 16)):
        program = cached.fork()
        Hyper(layers, **{**SMALL, "sample": sample}).apply(program, None)
        kls.append(compare(exact, replay(program, ids, 190)).kl)
    assert kls[0] < 1e-6 < kls[1] < kls[2] < 5
    program = cached.fork()
    Hyper(1, **SMALL).apply(program, None)  # nobody reads what the last layer makes of a prompt, but its last token
    assert compare(exact[:, 1:], replay(program, ids, 190)[:, 1:]).kl < 1e-6


def test_short_prompts_and_later_steps_are_exact(cached, tokens):
    ids, program = tokens(2, 100), cached.fork()
    Hyper(**SMALL).apply(program, None)
    assert torch.equal(replay(program, ids, 32), replay(cached, ids, 32))
    assert torch.equal(replay(program, ids, 0, 50), replay(cached, ids, 0, 50))
    assert not torch.equal(replay(program, ids, 64), replay(cached, ids, 64))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"window": 40}, "its window of 40 tokens bounds what a query reads already"),
        (
            {"tail": 8, "select": Select(Score("attention"), 0.5, when="prompt")},
            "its cache is chosen by the attention of the prompt, which takes the exact sums",
        ),
    ],
)
def test_sites_that_must_read_all(cached, changes, reason):
    cached.touched.clear()
    outcome = Hyper(**SMALL).apply(with_sites(cached, **changes), None)
    assert outcome.done == () and outcome.skipped == {"layer 0": reason, "layer 1": reason}
    assert not any(site.hyper for site in cached.cache.sites) and not cached.touched


@pytest.mark.parametrize(("option", "reason"), [("softcap", "its logits have a softcap"), ("sinks", "a learned sink")])
def test_softmaxes_of_another_kind(cached, option, reason):
    node = next(cached.calls(CACHED_ATTENTION))
    place = list(CACHED_ATTENTION.arguments).index(option)
    node.args = (*node.args[:place], 2.0, *node.args[place + 1 :])
    outcome = Hyper(**SMALL).apply(cached, None)
    assert outcome.done == ("layer 1",) and reason in outcome.skipped["layer 0"]


def test_encoded_caches_keep_their_encoding(cached):
    with_sites(cached, tail=32, page=32, sink=4)
    Hyper(**SMALL).apply(cached, None)
    assert [(s.tail, s.page, s.sink, s.hyper) for s in cached.cache.sites] == [(32, 32, 4, OPTIONS)] * 2


def test_a_second_step_is_refused(cached):
    Hyper(**SMALL).apply(cached, None)
    assert list(Hyper().requires(cached)) == ["layer 0 already approximates its prompts: keep one of the two steps"]


def test_there_must_be_a_cache_with_such_layers(llama, cached):
    assert list(Hyper(layers=3).requires(cached)) == ["layers names the last 3, but the cache has 2"]
    assert not list(Hyper(layers=2).requires(cached))


def test_there_must_be_a_cache(llama):
    assert list(Hyper().requires(llama)) == ["llama must have a cache plan, but has none: put cache.insert in front"]


def test_options_that_cannot_be():
    with pytest.raises(SmeltError, match="layers counts the last layers that approximate, not 0: leave the step out"):
        Hyper(layers=0)
    with pytest.raises(SmeltError, match="hyper: min_seq_len 100 is below one block of 256"):
        Hyper(min_seq_len=100)
