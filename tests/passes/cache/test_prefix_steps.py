"""cache.code, cache.edit and cache.parallel change no output, and name what they cannot stand beside."""

from dataclasses import replace

import pytest

from smelt.ir.cache import CachePlan
from smelt.ir.cache.code import Code as Coding
from smelt.ir.encoding import parse
from smelt.ir.errors import SmeltError
from smelt.passes.cache.code import Code
from smelt.passes.cache.edit import Edit
from smelt.passes.cache.encode import Encode
from smelt.passes.cache.parallel import Parallel
from smelt.passes.measure import compare, replay

HALF = parse("affine(bits=8, group=32)")


@pytest.mark.parametrize("step", [Code(), Edit(3), Parallel(2)], ids=lambda step: type(step).__name__)
def test_outputs_stay_as_they_are(cached, tokens, step):
    ids, program = tokens(1, 24), cached.fork()
    assert list(step.requires(program)) == []
    assert len(step.apply(program, None).done) == len(cached.cache.sites)
    assert compare(replay(cached, ids, 8), replay(program, ids, 8)).kl == 0


def test_options_are_noted(cached):
    Code(chunk=64, delta="anchor").apply(cached, None)
    assert all(site.code == Coding(chunk=64, delta="anchor") for site in cached.cache.sites)
    assert CachePlan.from_dict(cached.cache.to_dict()) == cached.cache and "cache" in cached.touched
    Edit(7).apply(cached, None)
    Parallel(1).apply(cached, None)
    assert cached.facts["edit"] == {"recompute": 7} and cached.facts["parallel"] == {"sink": 1}


@pytest.mark.parametrize("step", [Code(), Edit()], ids=lambda step: type(step).__name__)
def test_tokens_that_leave_their_tail_are_named(cached, step):
    Encode(values=HALF, sink=0, tail=8, page=8).apply(cached, None)
    (fault,) = step.requires(cached)
    assert "layer 0 lets them leave its tail" in fault
    assert list(Parallel().requires(cached)) == []


def test_a_coded_cache_is_not_encoded_afterwards(cached):
    Code().apply(cached, None)
    (fault,) = Encode(values=HALF, sink=0, tail=8, page=8).requires(cached)
    assert "its prompts are coded" in fault and "cache.code" in fault
    (fault,) = Code().requires(cached)
    assert "coded already" in fault


@pytest.mark.parametrize("step", [Edit(), Parallel()], ids=lambda step: type(step).__name__)
def test_keys_that_are_not_rotated_are_named(cached, step):
    cached.cache = CachePlan(tuple(replace(site, rope=None) for site in cached.cache.sites))
    (fault,) = step.requires(cached)
    assert "keys of layer 0 must be rotated" in fault
    assert list(Code().requires(cached)) == []  # such keys are coded as they are


def test_a_step_needs_a_cache(llama):
    for step in (Code(), Edit(), Parallel()):
        assert any("cache.insert" in fault for fault in step.requires(llama))


def test_bad_options_are_named():
    for make, message in [
        (lambda: Edit(-1), "-1 is negative"),
        (lambda: Parallel(-1), "-1 is negative"),
        (lambda: Code(chunk=0), "cannot be"),
    ]:
        with pytest.raises(SmeltError, match=message):
            make()
