"""Cache plans: what is legal, how many tokens and bits a context stores, JSON and back."""

import json
from dataclasses import replace

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from smelt.ir.cache import Cache, CachePlan, Counts, Select, Site
from smelt.ir.encoding import Affine, Dense
from smelt.ir.errors import SmeltError

K4 = Affine(4, 32, axis="channel", zero=True)
PAGE = sympy.Rational(96, 64 * 128)  # bits a value of what a page of 64 tokens takes in the page table
V4 = Affine(4, 32, axis="token", zero=True)
PLAIN = Site(layer=0, heads=4, kv_heads=2, key_dim=64, value_dim=64)
KIVI = replace(PLAIN, tail=64, page=64, sink=4, keys=K4, values=V4)


def simulate(site: Site, length: int) -> Counts:
    """Token by token, straight from the rule."""
    sink = body = tail = 0
    for _ in range(length):
        tail += 1
        while site.tail is not None and tail + sink >= site.sink + site.tail + site.page:
            if sink < site.sink:
                sink, tail = site.sink, tail - site.sink
            tail -= site.page
            body += site.kept
            while site.select and site.select.budget is not None and body > site.select.budget:
                body -= site.kept
    return Counts(sink, body, tail)


@given(
    sink=st.integers(0, 5),
    tail=st.integers(0, 9),
    page=st.integers(1, 7),
    keep=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    budget=st.sampled_from([None, 0, 9, 20]),
    length=st.integers(0, 80),
)
def test_counts_and_room_follow_the_rule_token_by_token(sink, tail, page, keep, budget, length):
    site = replace(PLAIN, sink=sink, tail=tail, page=page, select=Select("recency", keep, budget))
    assert site.counts(length) == simulate(site, length)
    room = site.room(length)
    left = [site.left(length + more) for more in range(room + 1)]
    assert room > 0
    assert left == [site.left(length)] * room + [site.left(length) + page]


def test_everything_stays_without_a_tail():
    assert PLAIN.counts(1000) == (0, 0, 1000)
    assert PLAIN.room(1000) is None


@pytest.mark.parametrize(
    "site",
    [
        PLAIN,
        KIVI,
        replace(KIVI, select=Select("key_norm", 0.5), dense="float16"),
        replace(KIVI, select=Select("key_norm", 0.5, 64), window=100),
        replace(PLAIN, sink=4, tail=96, page=8, select=Select("recency", budget=0)),
        replace(PLAIN, tail=16, page=16, keys=Dense("bfloat16"), values=Affine(8, 0)),
    ],
    ids=lambda site: str(site.select),
)
def test_measured_bytes_equal_the_formula(site):
    plan = CachePlan((site, replace(site, layer=1)))
    cache = Cache(plan, 1, 512)
    for step in range(0, 400, 25):
        size = (1, 2, 25, 64)
        cache.begin(torch.arange(step, step + 25)[None])
        for layer in (0, 1):
            cache.append(layer, torch.randn(size), torch.randn(size))
        cache.commit([list(range(25))])
        if step == 100:
            cache.end_prefill()
        if step >= 100:
            assert 8 * cache.nbytes().used == plan.bits(step + 25)
    context = sympy.Symbol("S", integer=True, positive=True)
    assert plan.bits(context).subs(context, 400) == plan.bits(400)


def test_bits_per_value_counts_scales_and_zeros():
    """4 bits in groups of 32 with a 16-bit scale and zero are 5 bits a value, the tail comes on top (KIVI)."""
    plan = CachePlan((replace(KIVI, sink=0, tail=64, dense="float16"),))
    assert plan.bits_per_value(64 + 100 * 64) == sympy.Rational(100 * (5 + PAGE) + 16, 101)
    kept = CachePlan((replace(KIVI, sink=0, tail=64, dense="float16", select=Select("recency", 0.5)),))
    assert kept.bits_per_value(64 + 100 * 64) == sympy.Rational(50 * (5 + 2 * PAGE) + 16, 101)
    placed = replace(KIVI, sink=0, tail=64, dense="float16", select=Select("key_norm", 0.5), window=10**6)
    placed = CachePlan((placed,))
    assert placed.bits_per_value(6464) - kept.bits_per_value(6464) == sympy.Rational(50 * 32, 101 * 128)


def test_a_plan_survives_json():
    plan = CachePlan((replace(KIVI, select=Select("key_norm", 0.5, 256)), replace(PLAIN, layer=1, window=128)))
    assert CachePlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_with_site_replaces_one_layer():
    plan = CachePlan((PLAIN, replace(PLAIN, layer=1)))
    assert plan.with_site(replace(KIVI, layer=1)).sites == (PLAIN, replace(KIVI, layer=1))
    with pytest.raises(SmeltError, match="no site for layer 7"):
        plan[7]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tail": None}, "set `tail`"),
        ({"page": 48}, "keys affine.*page 48 keeps 48 tokens.*group"),
        ({"select": Select("recency", 0.25)}, "page 64 keeps 16 tokens"),
        ({"tail": 16}, "closes groups of 32 tokens, but the tail keeps 16"),
        ({"heads": 3}, "3 query heads do not share 2 KV heads"),
        ({"dense": "int8"}, "dense 'int8'"),
        ({"select": Select("recency", 1.0, 40)}, "budget of 40 tokens does not hold one page of 64"),
        ({"key_dim": 40}, "keys affine.* multiple of 32"),
        ({"sink": -1}, "sink must not be negative"),
        ({"tail": -1}, "tail counts tokens"),
        ({"page": 0}, "must be positive"),
    ],
)
def test_what_cannot_be_stored_says_so(change, message):
    with pytest.raises(SmeltError, match=f"cache site of layer 0: .*{message}"):
        replace(KIVI, **change)


def test_select_and_plan_refuse_nonsense():
    for wrong in ({"score": "luck"}, {"score": "recency", "keep": 1.5}, {"score": "recency", "budget": -1}):
        with pytest.raises(SmeltError, match=r"select|score"):
            Select(**wrong)
    with pytest.raises(SmeltError, match="one site a layer"):
        CachePlan((PLAIN, PLAIN))


def test_keep_rounds_up_but_not_by_floating_point():
    assert replace(PLAIN, tail=0, page=30, select=Select("recency", 0.1)).kept == 3
    assert replace(PLAIN, tail=0, page=31, select=Select("recency", 0.1)).kept == 4
