"""attention.schedule: the order of work of every layer, and nothing else."""

from dataclasses import replace

import pytest
import torch

from smelt.ir.cache import CachePlan
from smelt.ir.errors import SmeltError
from smelt.passes.attention.schedule import Schedule
from smelt.passes.measure import replay


def test_every_layer_is_divided_so(cached, tokens):
    before, ids = cached.fork(), tokens(2, 40)
    outcome = Schedule().apply(cached, None)
    assert outcome.done == ("layer 0", "layer 1") and not outcome.skipped
    assert cached.cache == CachePlan(tuple(replace(site, schedule="stream_k") for site in before.cache.sites))
    assert CachePlan.from_dict(cached.cache.to_dict()) == cached.cache
    assert torch.equal(replay(cached, ids, 20), replay(before, ids, 20))


def test_a_second_step_changes_nothing(cached):
    Schedule().apply(cached, None)
    cached.touched.clear()
    outcome = Schedule().apply(cached, None)
    assert outcome.done == () and set(outcome.skipped.values()) == {"is divided by stream_k already"}
    assert not cached.touched
    assert Schedule("chunks").apply(cached, None).done == ("layer 0", "layer 1")


def test_there_must_be_a_cache(llama):
    assert list(Schedule().requires(llama)) == ["llama must have a cache plan, but has none: put cache.insert in front"]


def test_sites_know_their_schedules(cached):
    with pytest.raises(SmeltError, match="layer 0: schedule 'split' is not chunks or stream_k"):
        replace(cached.cache[0], schedule="split")
