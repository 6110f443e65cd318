"""What a cache keeps when it chooses: from prompts, at overflows, in tiers, merged, un-rotated, compact and in part."""

from dataclasses import replace

import pytest
import torch

from smelt.ir.cache import Cache, CachePlan, Estimate, Merge, Policy, Predict, Retrieve, Rope, Score, Select, Site, Tier
from smelt.ir.cache import retrieve as retrieve_module
from smelt.ir.encoding import Affine
from smelt.ir.errors import SmeltError

ROPE = Rope(tuple(10000 ** (-i / 8) for i in range(8)))
BASE = Site(layer=0, heads=4, kv_heads=2, key_dim=32, value_dim=16, sink=2, tail=8, page=8, rope=ROPE)
ATTENTION = Score("attention", queries=4)
K8, V8 = Affine(8, 8, axis="channel", zero=True), Affine(8, 0, zero=True)
SITES = {
    "prompt": replace(BASE, window=1000, select=Select(ATTENTION, 0.5, when="prompt")),
    "coded": replace(BASE, select=Select(ATTENTION, 0.5, when="prompt"), keys=K8, values=V8),
    "adaptive": replace(BASE, select=Select(ATTENTION, 0.5, when="prompt", heads="adaptive"), frame="pre"),
    "policy": replace(BASE, select=Select(ATTENTION, when="prompt", heads="policy", policy=Policy(0.8))),
    "heavy": replace(BASE, window=1000, select=Select(Score("attention", reduce="sum"), budget=16, when="overflow")),
    "means": replace(BASE, select=Select(Score(reduce="sum", normalize="count"), budget=16, when="overflow")),
    "norms": replace(BASE, select=Select("key_norm", 0.5, 16, "overflow")),
    "centers": replace(BASE, select=Select("centers", 0.5, when="prompt"), window=50),
    "tiers": replace(
        BASE, select=Select(ATTENTION, when="prompt"), keys=K8, values=V8, tiers=(Tier(share=0.5), ), page=16, tail=16
    ),
    "ladder": replace(BASE, hold=8, tiers=(Tier(K8, V8, budget=16), Tier(Affine(8, 8, axis="channel"), V8))),
    "merged": replace(BASE, select=Select(ATTENTION, budget=10, when="prompt"), frame="pre", merge=Merge(0.5)),
    "covered": replace(
        BASE, select=Select(ATTENTION, budget=10, when="prompt"), frame="pre", merge=Merge(1.0, cover=0.8)
    ),
    "compact": replace(BASE, select=Select(ATTENTION, 0.5, when="prompt"), frame="pre", compact=True),
    "stream": replace(BASE, select=Select("recency", 1.0, 16), frame="pre", compact=True),
    "estimate": replace(BASE, estimate=Estimate(12, 6, 2)),
    "pages": replace(BASE, retrieve=Retrieve("pages", 16)),
    "scan": replace(BASE, retrieve=Retrieve("scan", 12)),
}  # fmt: skip
every_site = pytest.mark.parametrize("site", SITES.values(), ids=SITES)
PROMPT, LENGTH = 61, 90


def data(site: Site, length: int = LENGTH, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = (site.heads, site.key_dim), (site.kv_heads, site.key_dim), (site.kv_heads, site.value_dim)
    q, k, v = (torch.randn(1, heads, length, dim, generator=random) for heads, dim in shapes)
    positions = torch.arange(length)
    return ROPE.turn(q, positions), ROPE.turn(k, positions), v


def feed(cache: Cache, site: Site, tokens: tuple[torch.Tensor, ...], first: int, last: int) -> torch.Tensor:
    """One step that commits tokens first … last - 1; returns its attention."""
    q, k, v = (x[:, :, first:last] for x in tokens)
    cache.begin(torch.arange(first, last)[None])
    cache.append(site.layer, k, v)
    out = cache.attend(site.layer, q, site.attention_scale, site.window)
    cache.commit([list(range(last - first))])
    return out


def prompted(site: Site, tokens: tuple[torch.Tensor, ...], length: int = PROMPT) -> Cache:
    cache = Cache(CachePlan((site,)), 1, 200)
    feed(cache, site, tokens, 0, length)
    cache.end_prefill()
    return cache


def stored(cache: Cache, head: int) -> int:
    """Tokens that the bodies hold of a head of the first row."""
    bodies = cache.segments[0].bodies
    return sum(int(b.pages[b.host_table[0, head, : b.host_held[0, head]].long(), 0].sum()) for b in bodies)


def state(cache: Cache, row: int = 0) -> list[torch.Tensor]:
    segments, tail = cache.segments[0], int(cache.counts(0)[row, 2])
    out = [segments.sink_k[row], segments.tail_k[row, :, :tail], segments.tail_v[row, :, :tail]]
    for body in segments.bodies:
        decoded = body.decoded(row)
        if decoded is not None:
            real = torch.ones_like(decoded.positions, dtype=torch.bool)
            real = real if decoded.bias is None else torch.isfinite(decoded.bias)
            out += [decoded.keys[real], decoded.values[real], decoded.positions[real]]
            out += [x[real] for x in (decoded.bias, decoded.mass) if x is not None]
    return out


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and torch.allclose(x, y, atol=1e-5) for x, y in zip(a, b, strict=True)
    )


@every_site
def test_later_tokens_store_the_same_in_steps_of_any_size(site):
    tokens = data(site)
    caches = []
    for sizes in ([1] * 29, [8, 8, 8, 5], [3] * 9 + [2]):
        cache, at = prompted(site, tokens), PROMPT
        for size in sizes:
            while size:
                new = min(size, cache.room()[0])
                feed(cache, site, tokens, at, at + new)
                at, size = at + new, size - new
        caches.append(state(cache))
        assert cache.lengths == [LENGTH]
    assert same(caches[0], caches[1]) and same(caches[0], caches[2])
    other = prompted(site, data(site, seed=1))
    assert not same(state(other), state(prompted(site, tokens)))


@every_site
def test_measured_bytes_equal_the_formula(site):
    tokens, plan = data(site), CachePlan((site,))
    cache = prompted(site, tokens)
    even = site.estimate is None and (site.select is None or site.select.heads == "even")
    if even:
        assert 8 * cache.nbytes().used == plan.bits(PROMPT) == site.bits(PROMPT, PROMPT)
    else:  # heads round to pages by themselves, a policy keeps what it must, and samples may share a cluster
        assert 8 * cache.nbytes().used <= site.bits(PROMPT, PROMPT) + site.kv_heads * site.page_bits(0)
    for at in range(PROMPT, LENGTH):
        feed(cache, site, tokens, at, at + 1)
        if even:
            assert 8 * cache.nbytes().used == site.bits(at + 1, PROMPT)
            assert cache.stored(0) == [sum(site.counts(at + 1, PROMPT))]


@every_site
def test_rows_part_where_they_were_one(site):
    tokens, other = data(site), data(site, seed=2)
    cache = prompted(site, tokens)
    cache.select_rows([0, 0])
    used = cache.nbytes().used
    alone = prompted(site, tokens)
    for at in range(PROMPT, LENGTH):
        cache.begin(torch.full((2, 1), at))
        rows = [torch.cat([a[:, :, at : at + 1], b[:, :, at : at + 1]]) for a, b in zip(tokens, other, strict=True)]
        cache.append(0, rows[1], rows[2])
        cache.attend(0, rows[0], site.attention_scale, site.window)
        cache.commit([[0], [0]])
        feed(alone, site, tokens, at, at + 1)
    assert same(state(cache, 0), state(alone))
    assert not same(state(cache, 1), state(alone))
    cache.select_rows([1])
    cache.restart()
    assert cache.nbytes().used < used and cache.segments[0].bodies[0].refs.sum() == 0


def test_a_prompt_keeps_what_its_last_queries_attend_to():
    site = SITES["prompt"]
    q, k, v = data(site)
    wanted = torch.tensor([5, 17, 30, 44])
    k = k * 0.1
    flat = q[0, :, PROMPT - 4 : PROMPT].unflatten(0, (2, 2)).mean((1, 2))
    k[0, :, wanted] = 4 * flat[:, None]
    cache = prompted(replace(site, select=Select(ATTENTION, budget=8, when="prompt")), (q, k, v))
    held = cache.segments[0].bodies[0].decoded(0).positions
    assert all(set(wanted.tolist()) <= set(held[g].tolist()) for g in (0, 1))
    assert held.shape == (2, 8)


@pytest.mark.parametrize("name", ["heavy", "means"])
def test_heavy_hitters_are_those_of_the_running_sum(name):
    """Token by token with a plain softmax over what is stored: the sums, or means, that decide are the same."""
    site = SITES[name]
    q, k, _ = tokens = data(site)
    cache = prompted(site, tokens, 30)
    stored = {g: list(range(30)) for g in (0, 1)}
    mass = torch.zeros(2, LENGTH)

    def attended(at: int) -> None:
        for g in (0, 1):
            seen = [t for t in stored[g] if t <= at]
            logits = q[0, 2 * g : 2 * g + 2, at] @ k[0, g, seen].T * site.attention_scale
            mass[g, seen] += torch.softmax(logits, -1).sum(0)

    def shrink(g: int, length: int) -> None:
        body = [t for t in stored[g] if 2 <= t < length - 8]
        best = sorted(body, key=lambda t: -float(mass[g, t]) / (length - t if name == "means" else 1))
        best = best[:16] if len(body) > 16 else body
        stored[g] = [t for t in stored[g] if t < 2 or t >= length - 8 or t in best]

    for at in range(30):
        attended(at)
    for g in (0, 1):
        shrink(g, 30)
    for at in range(30, 70):
        feed(cache, site, tokens, at, at + 1)
        for g in (0, 1):
            stored[g].append(at)
        attended(at)
        if (at + 1 - 30) % 8 == 0:
            for g in (0, 1):
                shrink(g, at + 1)
    decoded = cache.segments[0].bodies[0].decoded(0)
    for g in (0, 1):
        body = [t for t in stored[g] if 2 <= t < 70 - 8]
        assert decoded.positions[g].tolist() == body
        assert torch.allclose(decoded.mass[g], mass[g, body], atol=1e-4)


def test_compact_without_dropping_and_frame_pre_change_nothing():
    """Rotations are orthogonal, and a token that nothing before it has left keeps its position."""
    tokens = data(BASE)
    keep = Select(ATTENTION, 1.0, when="prompt")
    plain = replace(BASE, select=keep)
    outs = []
    for site in (plain, replace(plain, frame="pre"), replace(plain, frame="pre", compact=True)):
        cache = prompted(site, tokens)
        outs.append(torch.cat([feed(cache, site, tokens, at, at + 1) for at in range(PROMPT, LENGTH)], 2))
    assert torch.allclose(outs[0], outs[1], atol=1e-4) and torch.allclose(outs[0], outs[2], atol=1e-4)
    wrong = replace(plain, frame="pre", rope=Rope(tuple(0.9 * i for i in ROPE.inverse)))
    cache = prompted(wrong, tokens)
    for body in cache.segments[0].bodies:
        body.places.add_(1)  # a mutant: every key turned by one position more
    assert not torch.allclose(feed(cache, wrong, tokens, PROMPT, PROMPT + 1), outs[0][:, :, :1], atol=1e-2)


def test_streams_read_what_stands_in_the_cache_at_its_positions():
    site = SITES["stream"]
    q, k, v = tokens = data(site)
    cache = prompted(site, tokens)
    out = feed(cache, site, tokens, PROMPT, PROMPT + 1)
    left = site.left(PROMPT + 1)
    kept = list(range(2 + left - 16, PROMPT + 1))
    positions = torch.arange(PROMPT + 1)
    first = kept[0] - 2  # where the sinks stand now: right in front of what is kept
    plain = ROPE.turn(k[0, :, : PROMPT + 1], -positions)
    keys = torch.cat([ROPE.turn(plain[:, :2], torch.arange(first, first + 2)), k[0, :, kept]], 1)
    values = torch.cat([v[0, :, :2], v[0, :, kept]], 1)
    logits = q[0, :, PROMPT].unflatten(0, (2, 2)) @ keys.mT * site.attention_scale
    want = (torch.softmax(logits, -1) @ values).flatten(0, 1)
    assert torch.allclose(out[0, :, 0], want, atol=1e-4)
    gone = torch.softmax(q[0, :, PROMPT].unflatten(0, (2, 2)) @ torch.cat([k[0, :, :2], k[0, :, kept]], 1).mT, -1)
    assert not torch.allclose(out[0, :, 0], (gone @ values).flatten(0, 1), atol=1e-2)


def test_a_ladder_holds_the_newest_in_the_first_tier():
    site = SITES["ladder"]
    cache = prompted(site, data(site))
    left = site.left(PROMPT)
    pages = [body.decoded(0).positions[0].tolist() for body in cache.segments[0].bodies]
    assert pages[0] == list(range(2 + left - 8, 2 + left))
    assert pages[1] == list(range(2 + left - 24, 2 + left - 8))
    assert pages[2] == list(range(2, 2 + left - 24))


def test_tiers_part_tokens_by_score():
    site = replace(SITES["tiers"], window=1000, select=Select(Score("value_norm"), when="prompt"))
    q, k, v = data(site)
    v[0, :, 20:30] *= 5
    cache = prompted(site, (q, k, v))
    best, rest = (body.decoded(0).positions for body in cache.segments[0].bodies)
    count = PROMPT - 18
    assert best.shape[1] - (cache.segments[0].bodies[0].decoded(0).bias is not None) >= count - count // 2 - 8
    assert set(range(20, 30)) <= set(best[0].tolist()) and not set(range(20, 30)) & set(rest[0].tolist())


def test_merging_equal_keys_is_exact():
    """A survivor of n tokens with one key counts n times: its logit has ln n, its value is their mean."""
    site = replace(
        BASE,
        rope=None,
        sink=0,
        page=1,
        select=Select(Score("attention", queries=1), budget=1, when="prompt"),
        merge=Merge(1.0, -0.9),
    )
    q, k, v = data(site, 20)
    k[0, :, :12] = k[0, :, :1]
    cache = Cache(CachePlan((site,)), 1, 64)
    feed(cache, site, (q, k, v), 0, 20)
    step = torch.randn(1, 4, 1, 32)
    want = torch.softmax(step[0].unflatten(0, (2, 2))[:, :, 0] @ k[0].mT * site.attention_scale, -1)
    cache.end_prefill()
    new = torch.zeros(1, 2, 1, 32), torch.zeros(1, 2, 1, 16)
    cache.begin(torch.tensor([[20]]))
    cache.append(0, *new)
    got = cache.attend(0, step, site.attention_scale)
    weights = torch.cat([want, want[..., :0]], -1)
    logits = step[0].unflatten(0, (2, 2))[:, :, 0] @ torch.cat([k[0], new[0][0]], 1).mT * site.attention_scale
    mean = v[0].clone()
    mean[:, :12] = cache.segments[0].bodies[0].decoded(0).values
    full = (torch.softmax(logits, -1) @ torch.cat([mean, new[1][0]], 1)).flatten(0, 1)
    assert weights.shape[-1] == 20 and torch.allclose(got[0, :, 0], full, atol=1e-4)
    cache.segments[0].bodies[0].side["bias"].zero_()  # a mutant: what was merged counts once
    assert not torch.allclose(cache.attend(0, step, site.attention_scale)[0, :, 0], full, atol=1e-2)


@pytest.mark.parametrize("name", ["pages", "scan"])
def test_reading_all_of_the_body_is_reading_it(name):
    site = SITES[name]
    tokens = data(site)
    outs = []
    for budget in (1000, site.retrieve.budget):
        some = replace(site, retrieve=replace(site.retrieve, budget=budget))
        cache = prompted(some, tokens)
        outs.append(feed(cache, some, tokens, PROMPT, PROMPT + 1))
    dense = replace(site, retrieve=None)
    whole = feed(prompted(dense, tokens), dense, tokens, PROMPT, PROMPT + 1)
    assert torch.allclose(outs[0], whole, atol=1e-5)
    assert not torch.allclose(outs[1], whole, atol=1e-3)


@pytest.mark.parametrize("name", ["pages", "scan"])
def test_what_a_window_hides_takes_nothing_of_the_budget(name, monkeypatch):
    """28 body tokens are in reach, in 4 pages; those out of it have the loudest keys."""
    site = replace(SITES[name], window=40, retrieve=replace(SITES[name].retrieve, budget=32))
    q, k, v = data(site)
    k[:, :, :18] *= 4
    whole = replace(site, retrieve=None)
    want = feed(prompted(whole, (q, k, v)), whole, (q, k, v), PROMPT, PROMPT + 1)
    assert torch.allclose(feed(prompted(site, (q, k, v)), site, (q, k, v), PROMPT, PROMPT + 1), want, atol=1e-5)
    right = retrieve_module._near  # a mutant: a choice among all tokens
    monkeypatch.setattr(retrieve_module, "_near", lambda read, at, window: right(read, at, None))
    assert not torch.allclose(feed(prompted(site, (q, k, v)), site, (q, k, v), PROMPT, PROMPT + 1), want, atol=1e-3)


def test_heads_vote_by_logits_with_their_cap():
    site = SITES["scan"]
    q, k, v = data(site)
    q[:, 0] *= 20  # a head that attends to few tokens, but for the cap
    votes = {}
    for cap in (None, 2.0):
        cache = prompted(site, (q, k, v))
        cache.begin(torch.tensor([[PROMPT]]))
        cache.append(0, k[:, :, PROMPT : PROMPT + 1], v[:, :, PROMPT : PROMPT + 1])
        cache.attend(0, q[:, :, PROMPT : PROMPT + 1], site.attention_scale, None, cap)
        votes[cap] = set(cache.picked[0, 0][0, 0].nonzero().flatten().tolist())
    logits = q[0, :, PROMPT].unflatten(0, (2, 2)) @ k[0, :, 2 : 2 + site.left(PROMPT)].mT * site.attention_scale
    shares = torch.softmax(2 * torch.tanh(logits / 2), -1).sum((0, 1))
    assert votes[2.0] == set(shares.topk(12).indices.tolist()) != votes[None]


@pytest.mark.parametrize("name", ["prompt", "heavy", "policy"])
def test_a_models_own_sinks_are_in_the_softmax_of_scores(name):
    """Queries and heads that give most of theirs to a sink without a value count less."""
    site = replace(SITES[name], select=replace(SITES[name].select, budget=16))
    q, k, v = data(site)
    sinks = torch.tensor([9.0, -9.0, 3.0, 0.0])
    logits = q[0, :, :PROMPT].unflatten(0, (2, 2)) @ k[0, :, None, :PROMPT].mT * site.attention_scale
    logits = logits.masked_fill(torch.ones(PROMPT, PROMPT).triu(1).bool(), float("-inf"))
    extra = sinks.view(2, 2, 1, 1).expand(2, 2, PROMPT, 1)
    shares = torch.softmax(torch.cat([logits, extra], -1), -1)[..., 2 : 2 + site.left(PROMPT, PROMPT)]
    held = {}
    for mine in (sinks, None):
        cache = Cache(CachePlan((site,)), 1, 200)
        cache.begin(torch.arange(PROMPT)[None])
        cache.append(0, k[:, :, :PROMPT], v[:, :, :PROMPT])
        cache.attend(0, q[:, :, :PROMPT], site.attention_scale, site.window, None, mine)
        cache.commit([list(range(PROMPT))])
        cache.end_prefill()
        decoded = [body.decoded(0) for body in cache.segments[0].bodies]
        held[mine is None] = torch.cat([d.positions for d in decoded], 1)
    assert held[True].shape != held[False].shape or not torch.equal(held[True], held[False])
    if name != "policy":
        mass = shares[:, :, -4:].mean((1, 2)) if name == "prompt" else shares.sum((1, 2))
        assert torch.equal(held[False], mass.topk(16).indices.sort().values + 2)


def test_a_tree_reads_what_single_tokens_read():
    for site in (SITES["pages"], SITES["scan"]):
        q, k, v = tokens = data(site)
        cache = prompted(site, tokens)
        nodes = [PROMPT, PROMPT, PROMPT + 1]
        cache.begin(torch.tensor([nodes]), ancestors=torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 1]], dtype=torch.bool))
        index = [PROMPT, PROMPT + 5, PROMPT + 1]
        cache.append(0, k[:, :, index], v[:, :, index])
        tree = cache.attend(0, q[:, :, index], site.attention_scale)
        cache.commit([[0, 2]])
        alone = prompted(site, tokens)
        plain = [feed(alone, site, tokens, at, at + 1) for at in (PROMPT, PROMPT + 1)]
        assert torch.allclose(tree[:, :, 0], plain[0][:, :, 0], atol=1e-6)
        assert torch.allclose(tree[:, :, 2], plain[1][:, :, 0], atol=1e-6)


def test_bounds_of_pages_hold():
    site = SITES["pages"]
    q, k, _ = tokens = data(site)
    cache = prompted(site, tokens)
    body = cache.segments[0].bodies[0]
    for g in (0, 1):
        for page in range(int(body.host_held[0, g])):
            slot, span = int(body.host_table[0, g, page]), slice(2 + 8 * page, 10 + 8 * page)
            for h in (2 * g, 2 * g + 1):
                x = q[0, h, -1]
                bound = torch.maximum(x * body.side["low"][slot].float(), x * body.side["high"][slot].float()).sum()
                assert (k[0, g, span] @ x).max() <= bound + 1e-4


def test_a_page_is_chosen_from_by_the_attention_of_the_tail():
    site = replace(BASE, window=1000, select=Select(Score("attention"), 0.5))
    q, k, _ = tokens = data(site)
    held = prompted(site, tokens).segments[0].bodies[0].decoded(0).positions
    logits = q[0, :, :PROMPT].unflatten(0, (2, 2)) @ k[0, :, None, :PROMPT].mT * site.attention_scale
    mass = torch.softmax(logits.masked_fill(torch.ones(PROMPT, PROMPT).triu(1).bool(), float("-inf")), -1).sum((1, 2))
    pages = mass[:, 2 : 2 + site.left(PROMPT)].unflatten(1, (-1, 8))
    first = 2 + 8 * torch.arange(pages.shape[1])[:, None]
    assert torch.equal(held, (pages.topk(4).indices.sort().values + first).flatten(1))


def test_strides_count_positions_after_every_overflow():
    site = replace(BASE, select=Select(Score("stride", stride=4), 0.75, 16, "overflow"))
    tokens = data(site)
    cache = prompted(site, tokens)

    def best(held: list[int]) -> list[int]:
        return sorted(sorted(held, key=lambda p: (p % 4 == 3, p))[-12:])

    body = best(list(range(2, PROMPT - 8)))
    for at in range(PROMPT, PROMPT + 24):
        feed(cache, site, tokens, at, at + 1)
        if (at + 1 - PROMPT) % 8 == 0:
            body = body + list(range(at - 15, at - 7))
            body = best(body) if len(body) > 16 else body
            held = cache.segments[0].bodies[0].decoded(0)
            assert held.positions[0, torch.isfinite(held.bias[0])].tolist() == body


@pytest.mark.parametrize("heads", ["adaptive", "policy"])
def test_tiers_lose_nothing_where_heads_differ(heads):
    policy = Policy(0.8) if heads == "policy" else None
    select = Select(ATTENTION, 0.5 if policy is None else 1.0, when="prompt", heads=heads, policy=policy)
    whole = replace(BASE, window=1000, page=16, tail=16, select=select)
    tokens = data(whole)
    tokens[1][0, 0] *= 3  # the heads differ
    alone, tiered = (prompted(site, tokens) for site in (whole, replace(whole, tiers=(Tier(share=0.5),))))
    held = [[stored(cache, head) for head in (0, 1)] for cache in (alone, tiered)]
    assert held[0] == held[1] and held[0][0] != held[0][1]


def test_a_survivor_takes_its_weight_to_its_tier():
    site = replace(SITES["merged"], select=Select(ATTENTION, 0.5, when="prompt"))
    tokens = data(site)
    caches = [prompted(s, tokens) for s in (site, replace(site, window=1000, tiers=(Tier(share=0.5),)))]
    weights = []
    for cache in caches:
        pairs = {}
        for body in cache.segments[0].bodies:
            d = body.decoded(0)
            for g in (0, 1):
                pairs |= {
                    (g, int(p)): float(b) for p, b in zip(d.positions[g], d.bias[g], strict=True) if b > float("-inf")
                }
        weights.append(pairs)
    assert weights[0] == weights[1] and max(weights[0].values()) > 0


def test_centers_fill_tiers_in_their_order():
    site = replace(BASE, window=1000, select=Select("centers", 0.5, when="prompt"), tiers=(Tier(share=0.5),))
    _, k, _ = tokens = data(site)
    first, _ = prompted(site, tokens).segments[0].bodies
    longest = k[0, :, 2 : PROMPT - 8].norm(dim=-1).argmax(-1) + 2
    assert all(int(longest[g]) in first.decoded(0).positions[g].tolist() for g in (0, 1))


def test_a_compact_ladder_has_no_two_tokens_at_one_position():
    site = replace(SITES["ladder"], keys=None, frame="pre", compact=True, tiers=(Tier(budget=16),))
    cache = prompted(site, data(site))
    for row in ([0], [0, 0]):
        cache.select_rows(row)
        segments = cache.segments[0]
        places = torch.cat([b.decoded(0).positions[0] for b in reversed(segments.bodies)])
        end = 2 + site.left(PROMPT)
        assert places.tolist() == list(range(end - 24, end)) and int(segments.sink_at[0, 0]) == end - 26


def test_a_forecast_is_of_the_row_that_stands_there_now():
    site = replace(BASE, frame="pre", keys=K8, values=V8)
    plan = CachePlan((replace(site, predict=Predict(True)), replace(site, layer=1, predict=Predict())))
    maps = {"keys": torch.eye(65)[:, :64], "values": torch.cat([torch.zeros(64, 32), torch.eye(33)[:, :32]])}
    plan = plan.with_tables({f"1.predict.{role}": m for role, m in maps.items()})

    def made() -> Cache:
        cache = Cache(plan, 2, 200)
        _, k, v = (torch.cat([a, b]) for a, b in zip(data(site), data(site, seed=1), strict=True))
        cache.begin(torch.arange(PROMPT).expand(2, -1))
        for layer in (0, 1):
            cache.append(layer, k[:, :, :PROMPT], v[:, :, :PROMPT])
        cache.commit([list(range(PROMPT))] * 2)
        cache.end_prefill()
        return cache

    cache = made()
    body = cache.segments[1].bodies[0]
    before = [body.decoded(row).keys.clone() for row in (0, 1)]
    k = data(site)[1][0, :, 2 : 2 + before[0].shape[1]]
    assert torch.allclose(before[0], k, atol=0.05) and not torch.allclose(before[0], before[1], atol=0.5)
    cache.select_rows([1, 0])
    assert torch.equal(body.decoded(0).keys, before[1]) and torch.equal(body.decoded(1).keys, before[0])
    cache.restart()
    assert body.decoded(0) is None
    with pytest.raises(SmeltError, match="layer 0 stores what a forecast misses, but no encoded layer is before it"):
        Cache(CachePlan((replace(site, predict=Predict()),)), 1, 64)


def test_a_list_that_is_reused_must_fit():
    source = replace(BASE, retrieve=Retrieve("dense", 16))
    reuse = replace(BASE, layer=1, retrieve=Retrieve("reuse", 16, 0))
    Cache(CachePlan((source, reuse)), 1, 64)
    for wrong in (
        replace(reuse, page=16),
        replace(reuse, kv_heads=1),
        replace(reuse, retrieve=Retrieve("reuse", 16, 2)),
    ):
        with pytest.raises(SmeltError, match="layer 1 reads the list of layer"):
            Cache(CachePlan((source, wrong)), 1, 64)


def test_a_site_survives_json():
    default = replace(BASE, select=Select(ATTENTION, when="prompt", heads="policy", policy=Policy()))
    for site in (*SITES.values(), default):
        assert CachePlan.from_dict(CachePlan((site,)).to_dict()).sites == (site,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tiers": (Tier(share=0.5),)}, "put cache.select in front"),
        ({"tiers": (Tier(),)}, "need `hold`"),
        ({"hold": 8}, "with a tier below"),
        ({"merge": Merge()}, "when: prompt"),
        ({"merge": Merge(), "select": Select(ATTENTION, 0.5, when="prompt")}, "frame: pre, or merge values_only"),
        ({"compact": True}, "un-rotated, with frame: pre"),
        ({"frame": "pre", "rope": None}, "keys that were rotated"),
        ({"keys": K8, "select": Select("key_norm", 1.0, 16, "overflow")}, "store them dense"),
        ({"retrieve": Retrieve("pages", 4)}, "does not read one page of 8"),
        ({"retrieve": Retrieve("scan", 8), "select": Select("key_norm", 0.5)}, "one list for all KV heads"),
        ({"retrieve": Retrieve("pages", 8), "frame": "pre", "compact": True}, "bounds of pages"),
        ({"rope": Rope((1.0,) * 17)}, "rope turns 34 dims"),
        ({"tiers": (Tier(share=0.1),), "select": Select(ATTENTION, when="prompt")}, "less than one of 8 tokens"),
        ({"tiers": (Tier(share=0.5),), "select": Select("key_norm", 0.5), "hold": 8}, "leave hold out"),
        ({"tiers": (Tier(budget=4),), "hold": 8}, "a tier's budget of 4 tokens does not hold one page of 8"),
        (
            {"tiers": (Tier(share=0.5),), "select": Select("key_norm"), "frame": "pre", "compact": True},
            "tiers that share them by score mix",
        ),
        ({"select": SITES["means"].select, "frame": "pre", "compact": True}, "which compact forgets"),
        ({"retrieve": Retrieve("pages", 8), "select": Select("recency", budget=0)}, "nothing survives beyond the tail"),
    ],
)
def test_what_does_not_go_together_says_so(change, message):
    with pytest.raises(SmeltError, match=f"cache site of layer 0: .*{message}"):
        replace(BASE, **change)
