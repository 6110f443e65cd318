"""The cache store: what a row holds depends on its committed tokens alone, and freed memory is free."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from smelt.ir.cache import Cache, CachePlan, Select, Site
from smelt.ir.cache.leave import survivors
from smelt.ir.encoding import Affine
from smelt.ir.errors import SmeltError

PLAIN = Site(layer=0, heads=4, kv_heads=2, key_dim=32, value_dim=64)
CODED = replace(
    PLAIN,
    layer=1,
    sink=3,
    tail=16,
    page=16,
    keys=Affine(4, 8, axis="channel", zero=True),
    values=Affine(8, 32, zero=True),
)
SITES = {
    "dense": PLAIN,
    "coded": CODED,
    "halves": replace(CODED, dense="float16", sink=0),
    "norm": replace(CODED, select=Select("key_norm", 0.5)),
    "budget": replace(CODED, select=Select("key_norm", 0.5, 20), window=40),
    "recent": replace(CODED, select=Select("recency", 0.5, 20), tail=8),
    "stream": replace(PLAIN, sink=4, tail=10, page=5, select=Select("recency", budget=0)),
    "dense body": replace(PLAIN, tail=4, page=6, select=Select("key_norm", 0.3, 8), dense="bfloat16"),
}
LENGTH = 101
every_site = pytest.mark.parametrize("site", SITES.values(), ids=SITES)


def tokens(site: Site, length: int = LENGTH, rows: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    shape = (rows, site.kv_heads, length)
    return (torch.randn(*shape, site.key_dim, generator=random), torch.randn(*shape, site.value_dim, generator=random))


def feed(cache: Cache, site: Site, k: torch.Tensor, v: torch.Tensor, first: int, last: int) -> None:
    """One step that commits tokens first … last - 1 of every row."""
    new = last - first
    cache.begin(torch.arange(first, last).expand(len(k), -1))
    cache.append(site.layer, k[:, :, first:last], v[:, :, first:last])
    cache.commit([list(range(new))] * len(k))


def state(cache: Cache, site: Site, row: int = 0) -> dict[str, torch.Tensor]:
    """Everything that a row stores."""
    segments, (sink, _, tail) = cache.segments[site.layer], cache.counts(site.layer)[row, :3].tolist()
    out = {"sink_k": segments.sink_k[row, :, :sink], "sink_v": segments.sink_v[row, :, :sink]}
    out |= {"tail_k": segments.tail_k[row, :, :tail], "tail_v": segments.tail_v[row, :, :tail]}
    for number, body in enumerate(segments.bodies):
        slots = [body.host_table[row, g, : body.host_held[row, g]].long() for g in range(site.kv_heads)]
        parts = {f"keys.{n}": p for n, p in body.keys.items()} | {f"values.{n}": p for n, p in body.values.items()}
        for name, part in {**parts, **body.side, "pages": body.pages}.items():
            out |= {f"{number}.{g}.{name}": part[at] for g, at in enumerate(slots)}
    return out


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@every_site
@pytest.mark.parametrize("length", [0, 1, 18, 19, 35, 36, LENGTH])
def test_a_prompt_stores_what_single_tokens_store(site, length):
    k, v = tokens(site)
    at_once = Cache(CachePlan((site,)), 1, LENGTH)
    if length:
        feed(at_once, site, k, v, 0, length)
    at_once.end_prefill()
    one_by_one = Cache(CachePlan((site,)), 1, LENGTH)
    one_by_one.end_prefill()
    for i in range(length):
        feed(one_by_one, site, k, v, i, i + 1)
    assert same(state(at_once, site), state(one_by_one, site))
    assert at_once.stored(site.layer) == [sum(site.counts(length))]
    wrong = k.clone()
    wrong[0, 1, max(length - 1, 0)] += 1
    if length:
        mutant = Cache(CachePlan((site,)), 1, LENGTH)
        feed(mutant, site, wrong, v, 0, length)
        mutant.end_prefill()
        assert not same(state(mutant, site), state(one_by_one, site))


@every_site
def test_steps_of_any_size_store_the_same(site):
    k, v = tokens(site)
    states = []
    for sizes in ([1] * LENGTH, [7] * 14 + [3], [50, 51], [90] + [1] * 11):
        cache = Cache(CachePlan((site,)), 1, LENGTH)
        at = 0
        for i, size in enumerate(sizes):
            feed(cache, site, k, v, at, at + size)
            at += size
            if i == 0:
                cache.end_prefill()
        states.append(state(cache, site))
    assert all(same(states[0], other) for other in states[1:])


@every_site
def test_ragged_rows_store_what_they_store_alone(site):
    lengths = [0, 1, 63, 40, LENGTH]
    k, v = tokens(site, rows=len(lengths))
    together = Cache(CachePlan((site,)), len(lengths), LENGTH)
    together.begin(torch.arange(LENGTH).expand(len(lengths), -1), torch.arange(LENGTH) < torch.tensor(lengths)[:, None])
    together.append(site.layer, k, v)
    together.commit([list(range(n)) + [-1] * (LENGTH - n) for n in lengths])
    together.end_prefill()
    assert together.lengths == lengths
    for row, length in enumerate(lengths):
        alone = Cache(CachePlan((site,)), 1, LENGTH)
        if length:
            feed(alone, site, k[row : row + 1], v[row : row + 1], 0, length)
        alone.end_prefill()
        assert same(state(together, site, row), state(alone, site))


def test_left_padding_leaves_no_trace():
    k, v = tokens(CODED, 50)
    pad = torch.full_like(k[:, :, :7], float("nan"))
    cache = Cache(CachePlan((CODED,)), 1, LENGTH)
    cache.begin((torch.arange(57) - 7).clamp_min(0)[None], torch.arange(57)[None] >= 7)
    cache.append(1, torch.cat([pad, k], 2), torch.cat([v[:, :, :7], v], 2))
    cache.commit([list(range(7, 57))])
    cache.end_prefill()
    alone = Cache(CachePlan((CODED,)), 1, LENGTH)
    feed(alone, CODED, k, v, 0, 50)
    alone.end_prefill()
    assert same(state(cache, CODED), state(alone, CODED))


@every_site
def test_an_accepted_path_of_a_tree_stores_what_its_tokens_store(site):
    k, v = tokens(site, 60)
    tree, plain = (Cache(CachePlan((site,)), 1, LENGTH) for _ in range(2))
    for cache in (tree, plain):
        feed(cache, site, k, v, 0, 30)
        cache.end_prefill()
    at = 30
    while at < 60:
        path = min(3, tree.room()[0], 60 - at)
        nodes = torch.randn(1, 2, 7, site.key_dim), torch.randn(1, 2, 7, site.value_dim)
        where = [0, 2, 5][:path]  # the root and one branch
        for node, dense in zip(nodes, (k, v), strict=True):
            node[:, :, where] = dense[:, :, at : at + path]
        tree.begin(at + torch.tensor([[0, 1, 1, 2, 2, 2, 3]]), ancestors=torch.eye(7, dtype=torch.bool))
        tree.append(site.layer, *nodes)
        tree.commit(torch.tensor([where + [-1] * (4 - path)]))
        for i in range(at, at + path):
            feed(plain, site, k, v, i, i + 1)
        at += path
        assert same(state(tree, site), state(plain, site))


def test_an_unfinished_step_and_uncommitted_rows_leave_no_trace():
    k, v = tokens(CODED, 40, rows=2)
    cache = Cache(CachePlan((CODED,)), 2, LENGTH)
    feed(cache, CODED, k, v, 0, 40)
    cache.end_prefill()
    before = [{name: part.clone() for name, part in state(cache, CODED, row).items()} for row in (0, 1)]
    cache.begin(torch.arange(40, 45).expand(2, -1))
    cache.append(1, *(torch.randn(2, 2, 5, dim) for dim in (32, 64)))
    cache.begin(torch.full((2, 1), 40), torch.tensor([[True], [False]]))
    cache.append(1, *(torch.randn(2, 2, 1, dim) for dim in (32, 64)))
    cache.commit([[0], [-1]])
    assert cache.lengths == [41, 40]
    assert same(state(cache, CODED, 1), before[1]) and not same(state(cache, CODED, 0), before[0])


def test_key_norm_keeps_the_lowest_norms_in_position_order():
    site = replace(CODED, select=Select("key_norm", 0.25), keys=None)
    k = torch.ones(2, 3, 16, 32)
    k[0, 1, [9, 2, 15, 4]] *= 0.5
    assert survivors(site, k, k.flatten(1, 2))[0][0, 1].tolist() == [2, 4, 9, 15]
    assert survivors(site, k, k.flatten(1, 2))[0][1, 2].tolist() == [0, 1, 2, 3]  # a tie goes to the older token
    (newest,) = survivors(replace(site, select=Select("recency", 0.25)), k, k.flatten(1, 2))
    assert newest.shape == (2, 3, 4) and newest[0, 0].tolist() == [12, 13, 14, 15]


def test_sinks_never_leave_and_a_budget_drops_the_oldest_pages():
    site = replace(CODED, select=Select("recency", 0.5, 20), window=1000)
    k, v = tokens(site)
    cache = Cache(CachePlan((site,)), 1, LENGTH)
    feed(cache, site, k, v, 0, LENGTH)
    cache.end_prefill()
    segments = cache.segments[1]
    assert torch.equal(segments.sink_k[0], k[0, :, :3])
    # 101 tokens: 3 sinks, 5 pages of 16 gone (positions 3 to 82), the newest two of them kept by half
    assert site.counts(LENGTH) == (3, 16, 18)
    assert segments.bodies[0].decoded(0).positions[0].tolist() == [*range(59, 67), *range(75, 83)]


@every_site
def test_the_prompt_is_really_freed(site):
    k, v = tokens(site, 1000)
    cache = Cache(CachePlan((site,)), 1, 1200, scratch=16)
    feed(cache, site, k, v, 0, 1000)
    before, generation = cache.nbytes().allocated, cache.generation
    cache.end_prefill()
    after = cache.nbytes()
    assert cache.generation > generation
    assert after.used <= after.allocated
    if site.tail is not None:
        dense = 1000 * 2 * (32 + 64) * cache.segments[site.layer].tail_k.element_size()
        assert before >= dense
        slots = cache.segments[site.layer].width * dense // 1000  # the tail has room for a page and the next step
        assert after.allocated <= 1.01 * after.used + slots
        storage = sum(b.untyped_storage().nbytes() for b in cache.segments[site.layer].buffers())
        assert storage == after.allocated  # no view keeps a larger buffer alive


def test_constant_memory_does_not_grow_with_the_context():
    site = SITES["stream"]
    small, large = (Cache(CachePlan((site,)), 1, capacity).nbytes().allocated for capacity in (100, 10_000))
    assert small == large


class Allocations(TorchDispatchMode):
    """Counts results that own new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in known:
            self.seen.append(str(func))
        return out


@pytest.mark.parametrize("lengths", [(20, 20), (20, 21)], ids=["even", "ragged"])
def test_a_plain_step_allocates_nothing(lengths):
    plan = CachePlan((PLAIN, CODED))
    cache = Cache(plan, 2, LENGTH)
    new = max(lengths)
    cache.begin(torch.arange(new).expand(2, -1), torch.arange(new) < torch.tensor(lengths)[:, None])
    for site in plan.sites:
        cache.append(site.layer, *tokens(site, new, rows=2))
    cache.commit([list(range(n)) for n in lengths])
    cache.end_prefill()
    cache.begin(torch.tensor(lengths)[:, None])
    k, v = tokens(PLAIN, 1, rows=2)
    with Allocations() as counted:
        cache.append(0, k, v)
        cache.append(1, k, v)
        cache.commit([[0], [0]])
    assert counted.seen == []
    with Allocations() as counted:
        k + v[..., :32]
    assert counted.seen


def test_selecting_rows_drops_and_copies_them():
    k, v = tokens(CODED, 50, rows=3)
    cache = Cache(CachePlan((CODED,)), 3, LENGTH)
    cache.begin(torch.arange(50).expand(3, -1), torch.arange(50) < torch.tensor([10, 50, 40])[:, None])
    cache.append(1, k, v)
    cache.commit([list(range(n)) for n in (10, 50, 40)])
    cache.end_prefill()
    before = [{name: part.clone() for name, part in state(cache, CODED, row).items()} for row in range(3)]
    cache.select_rows([2, 0, 2])
    assert cache.lengths == [40, 10, 40] and cache.batch == 3
    assert all(same(state(cache, CODED, new), before[old]) for new, old in enumerate([2, 0, 2]))


def test_room_is_the_least_of_all_sites_and_the_context():
    plan = CachePlan((PLAIN, CODED, replace(CODED, layer=2, page=24)))
    for capacity, room in ((LENGTH, 4), (96, 1)):
        cache = Cache(plan, 1, capacity)
        assert cache.room() == [capacity]
        cache.end_prefill()
        assert cache.room() == [3 + 16 + 16]
        cache.begin(torch.arange(95)[None])
        for site in plan.sites:
            cache.append(site.layer, *tokens(site, 95))
        cache.commit([list(range(95))])
        assert cache.room() == [room]


def test_a_context_beyond_the_capacity_is_refused():
    cache = Cache(CachePlan((PLAIN,)), 2, 8)
    with pytest.raises(SmeltError, match=r"sequence 1 would reach 9 tokens.*context of 8.*shorten the prompt"):
        cache.begin(torch.arange(9).expand(2, -1), torch.arange(9) < torch.tensor([8, 9])[:, None])
    feed(cache, PLAIN, *tokens(PLAIN, 8, rows=2), 0, 8)
    with pytest.raises(SmeltError, match="would reach 9 tokens"):
        cache.begin(torch.full((2, 1), 8))
    cache.begin(torch.full((2, 3), 8), ancestors=torch.eye(3))  # a tree may look beyond, but not commit
    with pytest.raises(SmeltError, match="would reach 9 tokens"):
        cache.commit([[0], [0]])


def test_misuse_is_told():
    cache = Cache(CachePlan((PLAIN,)), 1, 8)
    with pytest.raises(RuntimeError, match="begin"):
        cache.append(0, *tokens(PLAIN, 1))
    with pytest.raises(ValueError, match="without a gap"):
        cache.begin(torch.tensor([[1]]))
    with pytest.raises(ValueError, match="without a gap"):
        cache.begin(torch.tensor([[0, 2]]))
    with pytest.raises(ValueError, match=r"positions must be \[1, T\]"):
        cache.begin(torch.zeros(2, 1))
    cache.begin(torch.tensor([[0]]))
    with pytest.raises(ValueError, match="cannot commit new token 1 of a step of 1"):
        cache.commit([[1]])
    with pytest.raises(SmeltError, match="at least one row"):
        Cache(CachePlan((PLAIN,)), 0, 8)


def test_what_cannot_be_encoded_names_the_layer():
    site = replace(CODED, keys=Affine(4, 8, axis="channel"))
    cache = Cache(CachePlan((site,)), 1, LENGTH)
    k, v = tokens(site)
    k[0, 0, 7, 0] = 1e9
    feed(cache, site, k, v, 0, LENGTH)
    with pytest.raises(SmeltError, match=r"cache of layer 1, tokens 3 to 82: .*overflows float16"):
        cache.end_prefill()
