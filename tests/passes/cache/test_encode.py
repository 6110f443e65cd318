"""cache.encode: what the plan says, what it costs in bits and in quality, and what it refuses."""

from dataclasses import replace

import pytest
import sympy

from smelt.ir.cache import CachePlan
from smelt.ir.encoding import Affine, parse
from smelt.ir.errors import SmeltError
from smelt.passes.cache.encode import Encode
from smelt.passes.cache.select import Select
from smelt.passes.measure import compare, replay

KEYS, VALUES = Affine(4, 32, axis="channel", zero=True), Affine(4, 32, zero=True)


def test_pages_are_encoded_as_asked(cached):
    before = cached.cache
    outcome = Encode(KEYS, VALUES, sink=2, tail=32, page=96).apply(cached, None)
    assert outcome.done == ("layer 0", "layer 1") and not outcome.skipped
    expected = (replace(s, keys=KEYS, values=VALUES, sink=2, tail=32, page=96) for s in before.sites)
    assert cached.cache == CachePlan(tuple(expected))
    assert cached.touched >= {"cache"}


def test_what_is_not_given_follows_the_plan(cached):
    Select(sink=1, tail=96, page=128, skip_layers=(0,)).apply(cached, None)
    Encode(KEYS, VALUES, tail=64).apply(cached, None)
    assert [(s.sink, s.tail, s.page, s.kept) for s in cached.cache.sites] == [(1, 64, 128, 128), (1, 64, 128, 64)]


def test_and_has_defaults_where_the_plan_says_nothing(cached):
    Encode(values=VALUES).apply(cached, None)
    assert [(s.sink, s.tail, s.page) for s in cached.cache.sites] == [(4, 64, 64)] * 2
    assert cached.cache[0].keys is None


def test_bits_are_true(cached):
    Encode(KEYS, VALUES, sink=0, tail=32, page=32).apply(cached, None)
    # 4 bits, and a scale and a zero of 16 bits for each 32 values; 32 tokens of 3200 stay in 32 bits. A page of 32
    # tokens of 128 numbers takes 96 bits in the page table
    page = sympy.Rational(96, 32 * 128)
    assert cached.cache.bits_per_value(3200) == (99 * (4 + 1 + page) + 32) / 100


def test_fewer_bits_cost_more(cached, tokens):
    ids = tokens(2, 160)
    exact = replay(cached, ids, 130)
    kls = []
    for bits in (8, 4, 2):
        program = cached.fork()
        keys, values = Affine(bits, 32, axis="channel", zero=True), Affine(bits, 32, zero=True)
        Encode(keys, values, sink=2, tail=32, page=32).apply(program, None)
        kls.append(compare(exact, replay(program, ids, 130)).kl)
    assert 1e-9 < kls[0] < kls[1] / 20 and kls[1] < kls[2] / 4 and kls[2] < 1


def test_keys_and_values_may_come_in_two_steps(cached):
    Encode(values=VALUES).apply(cached, None)
    assert not list(Encode(keys=KEYS).requires(cached))
    Encode(keys=KEYS).apply(cached, None)
    assert (cached.cache[1].keys, cached.cache[1].values) == (KEYS, VALUES)


def test_a_site_that_keeps_nothing_is_left_alone(cached):
    Select(budget=0, skip_layers=(1,)).apply(cached, None)
    outcome = Encode(KEYS, VALUES).apply(cached, None)
    assert outcome.done == ("layer 1",)
    assert outcome.skipped == {"layer 0": "nothing outlives its tail (budget 0)"}


def test_a_cache_is_encoded_once(cached):
    Encode(KEYS).apply(cached, None)
    assert list(Encode(KEYS, VALUES).requires(cached)) == [
        "keys of layer 0 must be dense, but are affine(bits=4, group=32, axis=channel, zero=True, scale=float16): "
        "a cache is encoded once"
    ]


def test_there_must_be_a_cache(llama):
    assert list(Encode(KEYS).requires(llama)) == [
        "llama must have a cache plan, but has none: put cache.insert in front"
    ]


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"keys": KEYS, "tail": 16}, "closes groups of 32 tokens, but the tail keeps 16: set tail to 32 or more"),
        ({"keys": KEYS, "page": 48}, "(page 48 keeps 48 tokens): dim -2 is 48, not a multiple of group=32"),
        ({"values": Affine(4, 48)}, "dim -1 is 64, not a multiple of group=48"),
    ],
)
def test_pages_that_do_not_fit_are_refused(cached, options, reason):
    (fault,) = Encode(**options).requires(cached)
    assert reason in fault and fault.endswith("(and so for 1 more layers)")


def test_selection_can_make_a_page_too_small(cached):
    Select(keep=0.25, skip_layers=()).apply(cached, None)
    (fault,) = Encode(KEYS).requires(cached)
    assert "(page 64 keeps 16 tokens): dim -2 is 16, not a multiple of group=32; change group, page or keep" in fault


def test_codes_must_fill_whole_blocks(cached):
    sites = (replace(site, key_dim=48, rope=None) for site in cached.cache.sites)
    cached.cache = CachePlan(tuple(sites))
    (fault,) = Encode(keys=parse("affine(bits=2, axis=channel, group=32)")).requires(cached)
    assert "the last dim, 48, must be a multiple of 64 (2-bit packing)" in fault


def test_nothing_to_encode_is_an_error():
    with pytest.raises(SmeltError, match="give an encoding for keys, values or both"):
        Encode()
