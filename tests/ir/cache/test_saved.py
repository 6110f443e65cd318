"""What a row stores leaves a cache and comes back bit for bit; open rows are cut, turned and joined exactly."""

from dataclasses import replace

import pytest
import torch

from smelt.ir.cache import Cache, CachePlan, Rope, Select, Site, Tier
from smelt.ir.cache.saved import Saved, cut, join, put_back, take_out, turned
from smelt.ir.encoding import Affine
from smelt.ir.errors import SmeltError

ROPE = Rope(tuple(1000.0 ** (-i / 12) for i in range(12)))
PLAIN = Site(layer=0, heads=4, kv_heads=2, key_dim=32, value_dim=64, rope=ROPE)
CODED = replace(
    PLAIN, layer=3, sink=3, tail=16, page=16,
    keys=Affine(4, 8, axis="channel", zero=True), values=Affine(8, 32, zero=True),
)  # fmt: skip
SITES = {
    "dense": PLAIN,
    "coded": CODED,
    "bfloat16": replace(CODED, dense="bfloat16", sink=0),
    "norm": replace(CODED, select=Select("key_norm", 0.5), window=40),
    "budget": replace(CODED, select=Select("key_norm", 0.5, 20)),
    "stream": replace(PLAIN, sink=4, tail=10, page=5, select=Select("recency", budget=0)),
    "pre": replace(CODED, frame="pre"),
    "compact": replace(CODED, frame="pre", compact=True, select=Select("key_norm", 0.5)),
    "ragged": replace(CODED, select=Select("key_norm", 0.5, when="prompt", heads="adaptive")),
    "overflow": replace(CODED, keys=None, values=None, select=Select("attention", 0.5, 32, when="overflow")),
    "ladder": replace(CODED, hold=32, tiers=(Tier(values=Affine(2, 32)),)),
}
every_site = pytest.mark.parametrize("site", SITES.values(), ids=SITES)
CAPACITY = 160


def step(cache: Cache, site: Site, first: int, last: int, seed: int = 0) -> torch.Tensor:
    """Tokens first … last - 1 of every row, which are the same in all; returns the attention's outputs."""
    random = torch.Generator().manual_seed(seed)
    q = torch.randn(1, site.heads, CAPACITY, site.key_dim, generator=random)
    k = torch.randn(1, site.kv_heads, CAPACITY, site.key_dim, generator=random)
    v = torch.randn(1, site.kv_heads, CAPACITY, site.value_dim, generator=random)
    cache.begin(torch.arange(first, last).expand(cache.batch, -1))
    q, k, v = (x[:, :, first:last].expand(cache.batch, -1, -1, -1).to(getattr(torch, site.dense)) for x in (q, k, v))
    cache.append(site.layer, k, v)
    out = cache.attend(site.layer, q, site.key_dim**-0.5)
    cache.commit([list(range(last - first))] * cache.batch)
    return out


def filled(site: Site, length: int, end: bool = True, seed: int = 0) -> Cache:
    cache = Cache(CachePlan((site,)), 1, CAPACITY)
    step(cache, site, 0, length, seed)
    if end:
        cache.end_prefill()
    return cache


def same(a: Saved, b: Saved) -> bool:
    parts = a.parts.keys() == b.parts.keys() and all(torch.equal(a.parts[name], b.parts[name]) for name in a.parts)
    return parts and (a.length, a.prompt, a.open) == (b.length, b.prompt, b.open)


@every_site
@pytest.mark.parametrize("length", [1, 36, 101])
def test_a_row_comes_back_and_goes_on_as_if_it_had_never_left(site: Site, length: int) -> None:
    first = filled(site, length)
    saved = take_out(first, 0)
    other = Cache(first.plan, 2, CAPACITY, scratch=3)
    step(other, site, 0, 7, seed=1)  # what it held is gone
    put_back(other, saved)
    assert same(take_out(other, 0), saved) and same(take_out(other, 1), saved)
    assert other.lengths == [length] * 2 and other.room() == first.room() * 2
    for at in range(length, length + 20):
        mine, theirs = step(first, site, at, at + 1), step(other, site, at, at + 1)
        assert torch.equal(mine.expand_as(theirs), theirs)
    assert same(take_out(first, 0), take_out(other, 1))


@every_site
def test_what_was_taken_out_is_a_copy(site: Site) -> None:
    cache = filled(site, 60)
    saved, again = take_out(cache, 0), take_out(cache, 0)
    for buffer in cache.segments[site.layer].buffers():
        buffer.zero_()
    assert same(saved, again) and saved.nbytes > 0


@every_site
def test_an_open_row_is_encoded_where_it_is_put(site: Site) -> None:
    whole = filled(site, 101)
    cache = Cache(whole.plan, 1, CAPACITY)
    put_back(cache, take_out(filled(site, 101, end=False), 0))
    cache.end_prefill()
    assert same(take_out(cache, 0), take_out(whole, 0))


@every_site
def test_every_part_is_needed_and_none_else_is_taken(site: Site) -> None:
    saved = take_out(filled(site, 101), 0)
    cache = Cache(CachePlan((site,)), 1, CAPACITY)
    for name, part in saved.parts.items():
        for wrong in (
            {k: v for k, v in saved.parts.items() if k != name},
            {**saved.parts, name: part[..., :-1] if part.dim() else part.float()},
            {**saved.parts, name: part.double()},
        ):
            with pytest.raises(SmeltError, match=f"'{name}'|pages"):
                put_back(cache, replace(saved, parts=wrong))
            assert cache.lengths == [0] and cache.prefilling
    with pytest.raises(SmeltError, match="does not store"):
        put_back(cache, replace(saved, parts={**saved.parts, f"{site.layer}.more": torch.zeros(1)}))
    with pytest.raises(SmeltError, match="context of 50"):
        put_back(Cache(CachePlan((site,)), 1, 50), saved)


def test_pieces_of_an_open_row_join_to_what_it_was() -> None:
    saved = take_out(filled(PLAIN, 50, end=False), 0)
    pieces = [cut(saved, 0, 7), cut(saved, 7, 7), cut(saved, 7, 30), cut(saved, 30, 50)]
    assert same(join(pieces), saved)
    assert not same(join(pieces[::-1]), saved)


@pytest.mark.parametrize("shift", [-20, 0, 1, 1000])
def test_keys_turn_as_if_they_had_been_written_further_on(shift: int) -> None:
    plain = torch.randn(2, 30, 32)
    at = torch.arange(25, 55)
    saved = Saved(30, 0, True, {"0.tail_k": ROPE.turn(plain, at), "0.tail_v": plain, "0.counted": torch.tensor(0)})
    moved = turned(saved, CachePlan((PLAIN,)), shift)
    assert torch.allclose(moved.parts["0.tail_k"], ROPE.turn(plain, at + shift), atol=3e-4)
    assert torch.equal(moved.parts["0.tail_v"], plain)
    wrong = turned(saved, CachePlan((PLAIN,)), shift + 1).parts["0.tail_k"]
    assert not torch.allclose(wrong, ROPE.turn(plain, at + shift), atol=3e-2)


def test_what_cannot_be_cut_or_moved_says_why() -> None:
    closed = take_out(filled(CODED, 50), 0)
    with pytest.raises(SmeltError, match="cannot be cut or joined"):
        cut(closed, 0, 10)
    with pytest.raises(SmeltError, match="cannot be cut or joined"):
        join([closed])
    still = replace(PLAIN, rope=None)
    with pytest.raises(SmeltError, match="layer 0 are not known to be rotated"):
        turned(take_out(filled(still, 10, end=False), 0), CachePlan((still,)), 3)
