"""cache.select: sites as planned, a measurable and bounded loss, and the orders and shapes it refuses."""

from dataclasses import replace

import pytest
import sympy
import torch

from smelt.ir.cache import CachePlan, Score, Select
from smelt.ir.encoding import parse
from smelt.ir.errors import SmeltError
from smelt.passes.cache.encode import Encode
from smelt.passes.cache.select import Select as Selects
from smelt.passes.measure import compare, replay

ALL = {"skip_layers": (), "sink": 2, "tail": 8, "page": 16}


def test_sites_that_are_not_skipped_keep_a_part_of_each_page(cached):
    before = cached.cache
    outcome = Selects(keep=0.25, budget=64, sink=2, tail=32, page=16, skip_layers=(0,)).apply(cached, None)
    assert outcome.done == ("layer 1",) and outcome.skipped == {"layer 0": "named in skip_layers"}
    chosen = replace(before[1], sink=2, tail=32, page=16, select=Select("key_norm", 0.25, 64))
    assert cached.cache == CachePlan((before[0], chosen))
    assert cached.touched >= {"cache"}


def test_the_defaults_are_the_papers(cached):
    step = Selects()
    assert (step.score, step.keep, step.budget, step.skip_layers) == (None, 0.5, None, (0, 1))
    Selects(skip_layers=()).apply(cached, None)
    assert cached.cache[0].select.score == Score("key_norm")
    assert (step.sink, step.tail, step.page) == (4, 64, 64)


def test_half_the_tokens_are_half_the_bits(cached):
    Selects("recency", keep=0.5, skip_layers=(), sink=0, tail=0, page=16).apply(cached, None)
    page = sympy.Rational(96, 16 * 128)  # what a page of 16 tokens takes in the page table
    assert cached.cache.bits_per_value(16 * 100) == 16 + page
    norms = (replace(s, select=Select("key_norm", 0.5), window=10**6) for s in cached.cache.sites)
    # where a window reads it, a position of 32 bits for each surviving key and value of 64
    assert CachePlan(tuple(norms)).bits_per_value(16 * 100) == 16 + page + sympy.Rational(32, 2 * 128)


@pytest.mark.parametrize("score", ["key_norm", "recency"])
def test_fewer_tokens_cost_more(cached, tokens, score):
    ids = tokens(2, 96)
    exact = replay(cached, ids, 70)
    kls = []
    for keep in (0.75, 0.25):
        program = cached.fork()
        Selects(score, keep=keep, **ALL).apply(program, None)
        kls.append(compare(exact, replay(program, ids, 70)).kl)
    assert 1e-4 < kls[0] < kls[1] < 5


def test_nothing_is_lost_before_the_first_page_leaves(cached, tokens):
    program, ids = cached.fork(), tokens(2, 30)
    Selects(keep=0.25, **{**ALL, "tail": 40}).apply(program, None)
    assert torch.equal(replay(program, ids, 12), replay(cached, ids, 12))


def test_norms_of_normalised_or_biased_keys_are_noted():
    transformers = pytest.importorskip("transformers")
    from smelt.ir.capture.hf import capture_hf
    from smelt.passes.cache.insert import Insert

    shape = dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=97, max_position_embeddings=64,
    )  # fmt: skip
    found = []
    for config in (transformers.Qwen3Config(**shape, head_dim=16), transformers.Qwen2Config(**shape)):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        program = capture_hf(model)
        Insert().apply(program, None)
        assert not Selects("recency", skip_layers=()).apply(program.fork(), None).notes
        found.append(Selects(skip_layers=()).apply(program, None).notes["key_norm"])
    assert found == [
        "keys of 1 layers are normalised before they are stored, so that their norms differ little",
        "keys of 1 layers carry a bias, which is part of their norm",
    ]


def test_plain_keys_need_no_note(cached):
    assert not Selects(skip_layers=()).apply(cached, None).notes


def test_selection_before_the_cache_is_refused(llama):
    assert list(Selects().requires(llama)) == ["llama must have a cache plan, but has none: put cache.insert in front"]


def test_one_selection_a_cache(cached):
    Selects(skip_layers=(0,)).apply(cached, None)
    assert list(Selects(skip_layers=()).requires(cached)) == [
        "layer 1 must keep every token, but already keeps 0.5 of them by key_norm: put both into one cache.select"
    ]
    assert not list(Selects(skip_layers=(1,)).requires(cached))  # a layer that is still whole may be selected from


def test_channels_close_pages_for_selection(cached):
    Encode(keys=parse("affine(bits=4, axis=channel, group=32)")).apply(cached, None)
    assert list(Selects(skip_layers=()).requires(cached)) == [
        "token-granular selection must come before keys are stored per channel: move cache.select in front"
    ]


def test_tokens_do_not(cached):
    Encode(values=parse("affine(bits=4, group=32)")).apply(cached, None)
    assert not list(Selects(skip_layers=()).requires(cached))


def test_layers_are_those_of_the_cache(cached):
    assert list(Selects().requires(cached)) == ["skip_layers leaves none of the layers 0 to 1 to select from"]
    assert list(Selects(skip_layers=(2, 61)).requires(cached)) == [
        "skip_layers names layer 2, but the cache has the layers 0 to 1"
    ]


def test_a_budget_must_hold_a_page(cached):
    (fault,) = Selects(budget=8, skip_layers=()).requires(cached)
    assert fault == (
        "cache site of layer 0: a budget of 8 tokens does not hold one page of 32: raise it, or lower page or keep "
        "(and so for 1 more layers)"
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"keep": 1.0}, "keep 1.0 without a budget drops no token"),
        ({"keep": 1.5}, "keep is a fraction between 0 and 1, not 1.5"),
        ({"budget": -1}, "-1 is negative"),
        ({"score": "norm"}, "unknown by 'norm'"),
    ],
)
def test_options_that_select_nothing_are_errors(options, message):
    with pytest.raises(SmeltError, match=message):
        Selects(**options)
