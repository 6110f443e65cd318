"""Accepted tokens closed up in all layers by one call: what the store does, layer by layer."""

import pytest
import torch

from smelt.codegen import close_up as module
from smelt.codegen.close_up import CloseUp
from smelt.ir.cache import Cache, CachePlan, Site
from smelt.ir.cache.segments import keep

ACCEPTED = ([0], [0, 1, 2], [0, 1, 3, 7], [2, 3], [1, 4, 5, 6], [0, 7], [3, 1, 2], [5, 5])


def layers(dense: str = "float16", rows: int = 3) -> Cache:
    """A cache of layers that differ in heads and dims, with something in every slot."""
    shapes = [(4, 2, 16, 16), (4, 4, 24, 8), (2, 1, 64, 64)]
    sites = [
        Site(layer=layer, heads=h, kv_heads=g, key_dim=d, value_dim=e, dense=dense)
        for layer, (h, g, d, e) in enumerate(shapes)
    ]
    cache, random = Cache(CachePlan(tuple(sites)), rows, 40, scratch=8), torch.Generator().manual_seed(1)
    for segments in cache.segments.values():
        for tail in segments.tails.values():
            tail.copy_(torch.randn(tail.shape, generator=random))
    return cache


def held(cache: Cache) -> list[torch.Tensor]:
    return [tail for segments in cache.segments.values() for tail in segments.tails.values()]


def equal(accepted: list[int], dense: str = "float16") -> bool:
    close, mine, want = CloseUp(), layers(dense), layers(dense)
    for row, offset in ((1, 9), (2, 0), (0, 17)):
        close(list(mine.segments.values()), 0, row, offset, accepted)
        keep(list(want.segments.values()), 0, row, offset, accepted)
    return all(torch.equal(a, b) for a, b in zip(held(mine), held(want), strict=True))


@pytest.mark.parametrize("dense", ["float16", "float32", "bfloat16"])
def test_equals_the_store(dense: str) -> None:
    """In any order: what does not ascend goes by the store itself."""
    assert all(equal(accepted, dense) for accepted in ACCEPTED)


def test_follows_buffers_that_move() -> None:
    close, mine, want = CloseUp(), layers(), layers()
    for cache, closed in ((mine, close), (want, keep)):
        for width in (0, 60):
            if width:
                for segments in cache.segments.values():
                    segments.resize_tail(width, [40] * 3)
                cache.generation += 1
            closed(list(cache.segments.values()), cache.generation, 1, 4, [1, 3])
    assert all(torch.equal(a[:, :, :40], b[:, :, :40]) for a, b in zip(held(mine), held(want), strict=True))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("row * tails[1] + g", "row + g"), ("+ offset) * tails", ") * tails"), ("count--, tails += 4", "count -= 2")],
)
def test_a_mutant_is_seen(monkeypatch: pytest.MonkeyPatch, right: str, wrong: str) -> None:
    assert right in module._SOURCE
    monkeypatch.setattr(module, "_SOURCE", module._SOURCE.replace(right, wrong))
    monkeypatch.setattr(module, "_kernel", module._kernel.__wrapped__)
    assert not equal([0, 1, 3, 7])
