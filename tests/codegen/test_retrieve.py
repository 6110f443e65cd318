"""C++ lists of what a query reads: the entries that the reference reads, the same alone and in a tree, and mutants."""

from dataclasses import replace

import pytest
import torch

from smelt.codegen import retrieve as module
from smelt.codegen.retrieve import retrieve
from smelt.codegen.unit import Unit
from smelt.ir.cache import Cache, CachePlan, Retrieve, Rope, Select, Site
from smelt.ir.encoding import Affine
from smelt.ir.errors import SmeltError

from .mutants import mutant

PLAIN = Site(layer=0, heads=8, kv_heads=2, key_dim=64, value_dim=16, sink=4, tail=16, page=16)
ROPE = Rope(tuple(10000.0 ** (-i / 10) for i in range(10)))
PAGES, SCAN = replace(PLAIN, retrieve=Retrieve("pages", 100)), replace(PLAIN, retrieve=Retrieve("scan", 70))
SITES = {
    "pages": PAGES,
    "pages of few heads": replace(PAGES, heads=2, key_dim=24, page=5, dense="float16", retrieve=Retrieve("pages", 55)),
    "pages of survivors": replace(PAGES, select=Select("key_norm", 0.5), heads=6),
    "pages of a prompt": replace(PAGES, select=Select("random", 0.7, when="prompt"), keys=Affine(8, 32, "token")),
    "scan": SCAN,
    "halves": replace(SCAN, dense="float16", retrieve=Retrieve("dense", 33)),
    "odd": replace(SCAN, heads=3, kv_heads=3, key_dim=20, dense="bfloat16", page=10, retrieve=Retrieve("scan", 200)),
    "coded": replace(SCAN, keys=Affine(4, 16, "channel", True), dense="float16"),
    "coded by token, turned": replace(SCAN, keys=Affine(8, 32, "token", True), frame="pre", rope=ROPE, page=24),
    "wide group": replace(SCAN, heads=40, kv_heads=1, page=32),
    "pages in a window": replace(PAGES, window=700, softcap=2.0),
    "survivors in a window": replace(PAGES, select=Select("key_norm", 0.5), heads=6, window=900),
    "scan in a window": replace(SCAN, window=700, softcap=2.0),
    "a window of the tail": replace(SCAN, window=9),
}
every_site = pytest.mark.parametrize("site", SITES.values(), ids=SITES)
CAPACITY = 2000
LENGTHS = [3, 150, 1801]  # nothing in the body, all of it read, several units of work


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompted(site: Site, lengths: list[int], seed: int = 0) -> Cache:
    """A cache of so many tokens a row, whose keys have a few loud ones."""
    cache, longest, rows = Cache(CachePlan((site,)), len(lengths), CAPACITY), max(lengths), len(lengths)
    keys = normal(rows, site.kv_heads, longest, site.key_dim, seed=seed)
    keys *= 1 + 2 * normal(rows, 1, longest, 1, seed=seed + 1).abs()
    valid = torch.arange(longest) < torch.tensor(lengths)[:, None]
    cache.begin(torch.arange(longest).expand(rows, -1), valid)
    cache.append(site.layer, keys, normal(rows, site.kv_heads, longest, site.value_dim, seed=seed + 2))
    cache.commit([list(range(n)) for n in lengths])
    cache.end_prefill()
    return cache


def begun(cache: Cache, site: Site, tokens: int, seed: int = 7) -> torch.Tensor:
    """Starts a step of so many tokens; their queries, with strides of their own."""
    cache.begin(torch.tensor(cache.lengths)[:, None] + torch.arange(tokens))
    for row in range(cache.batch):
        cache._check_fits(row, cache.lengths[row] + tokens)
    return normal(cache.batch, tokens, site.heads, site.key_dim + 2, seed=seed)[..., : site.key_dim].transpose(1, 2)


def listed(cache: Cache, q: torch.Tensor, scale: float = 0.3, layer: int = 0) -> list[list[list[torch.Tensor]]]:
    """The kernel's lists, by row, new token and KV head."""
    (call,), lists = retrieve(cache, layer, q, scale, cache.plan[layer].softcap)
    call()
    assert (lists is None) == (cache.plan[layer].retrieve.by == "dense")
    picks, count = module._LISTS[cache][layer, q.shape[2]]
    rows = zip(picks, count, strict=True)
    return [[[p[:n] for p, n in zip(*g, strict=True)] for g in zip(*t, strict=True)] for t in rows]


def wanted(cache: Cache, site: Site, q: torch.Tensor, scale: float) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """By row: float64 scores [T, G, n] of entries, -inf for none, and how many are read [T, G]."""
    out, (body,) = {}, cache.segments[site.layer].bodies
    unit = site.kept if site.retrieve.by == "pages" else 1
    for row in range(cache.batch):
        decoded = body.decoded(row)
        if decoded is None:
            continue
        grouped = q[row].double().unflatten(0, (site.kv_heads, site.group))
        held = body.host_held[row]
        distance = cache.step.positions[row][:, None, None] - decoded.positions
        near = distance < (site.window or CAPACITY)
        near &= decoded.bias.isfinite() if decoded.bias is not None else True
        near = near.unflatten(-1, (-1, unit)).any(-1)  # [T, G, n]
        if site.retrieve.by == "pages":
            live = torch.arange(int(held.max())) < held[:, None]
            near &= live
            slots = torch.where(live, body.host_table[row, :, : int(held.max())].long(), 0)
            sides = [body.side[name][slots].double()[:, None, None] for name in ("low", "high")]
            bound = torch.maximum(*(grouped[:, :, :, None] * side for side in sides)).sum(-1).amax(1)
            scores = bound.transpose(0, 1)
        else:
            logits = grouped @ decoded.keys.double()[:, None].mT * scale
            logits = logits if site.softcap is None else torch.tanh(logits / site.softcap) * site.softcap
            shares = torch.softmax(logits.masked_fill(~near[:, 0], -torch.inf), -1).sum((0, 1))
            scores = shares[:, None].expand(-1, site.kv_heads, -1)
        out[row] = scores.masked_fill(~near, -torch.inf), near.sum(-1).clamp(max=site.retrieve.budget // unit)
    return out


def error(cache: Cache, site: Site, q: torch.Tensor, scale: float = 0.3) -> float:
    """By how much of the spread the best entry that is not read beats the worst that is; 1 for malformed lists."""
    worst, want = 0.0, wanted(cache, site, q, scale)
    for row, by_token in enumerate(listed(cache, q, scale)):
        for t, by_head in enumerate(by_token):
            for g, picks in enumerate(by_head):
                blank = torch.zeros(q.shape[2], site.kv_heads, 0)
                scores, most = want.get(row, (blank, blank.sum(-1)))
                mine = scores[t, g]
                good = len(picks) == most[t, g] and bool((picks.diff() > 0).all())
                if not good or (len(picks) and (int(picks[0]) < 0 or int(picks[-1]) >= len(mine))):
                    return 1.0
                left = torch.ones_like(mine, dtype=torch.bool)
                left[picks.long()] = False
                if len(picks) and left.any():
                    spread = mine[mine.isfinite()].max() - mine[mine.isfinite()].min()
                    worst = max(worst, float((mine[left].max() - mine[~left].min()) / spread))
    return worst


TOLERANCE = 1e-6  # of the spread; float32 sums of 64 products


@every_site
@pytest.mark.parametrize("tokens", [1, 5])
def test_the_best_entries_are_read(site, tokens):
    cache = prompted(site, LENGTHS)
    q = begun(cache, site, tokens)
    assert error(cache, site, q) < TOLERANCE


@every_site
def test_the_reference_reads_the_same(site):
    """Bit for bit but for entries whose scores float32 cannot tell apart."""
    cache = prompted(site, LENGTHS)
    q = begun(cache, site, 3)
    mine = listed(cache, q)
    new = [torch.zeros(cache.batch, site.kv_heads, 3, dim) for dim in (site.key_dim, site.value_dim)]
    cache.append(0, *new)
    cache.attend(0, q, 0.3, site.window, site.softcap)
    differ = total = 0
    for (_, row), seen in cache.picked.items():
        for t in range(3):
            for g in range(site.kv_heads):
                entries = seen[g, t].view(-1, site.kept)[:, 0] if site.retrieve.by == "pages" else seen[g, t]
                held = int(cache.segments[0].bodies[0].host_held[row, g])
                want = entries[: held if site.retrieve.by == "pages" else held * site.kept].nonzero().flatten()
                differ += len(set(want.tolist()) ^ set(mine[row][t][g].tolist()))
                total += len(want)
    assert (total > 60 or site.window == 9) and differ <= 2


@every_site
def test_lists_do_not_depend_on_what_else_a_step_brings(site, monkeypatch):
    cache = prompted(site, LENGTHS)
    q = begun(cache, site, 20)
    together = listed(cache, q)
    monkeypatch.setattr(module, "SCRATCH", 1 << 16)
    monkeypatch.setenv("SMELT_THREADS", "1")
    blocks = listed(cache, q)
    for t in range(20):
        cache.begin(torch.tensor(cache.lengths)[:, None] + t, ancestors=torch.ones(1, 1, dtype=torch.bool))
        alone = listed(cache, q[:, :, t : t + 1])
        for row in range(len(LENGTHS)):
            for mine, others, again in zip(alone[row][0], together[row][t], blocks[row][t], strict=True):
                assert torch.equal(mine, others) and torch.equal(mine, again)


@pytest.mark.parametrize("by", ["pages", "scan"])
@pytest.mark.parametrize("twins", [2, 1000])
def test_of_equal_entries_the_older_are_read(by, twins):
    """All keys are alike but every `twins`-th page, which is better: ties are in the budget's last entries."""
    site = replace(PLAIN, retrieve=Retrieve(by, 96))
    cache = Cache(CachePlan((site,)), 1, CAPACITY)
    keys = torch.zeros(1, 2, 820, 64)
    keys[:, :, :, 0] = 1.0 + (torch.arange(820).sub(4).div(16, rounding_mode="floor") % twins == 1)
    cache.begin(torch.arange(820)[None])
    cache.append(0, keys, torch.zeros(1, 2, 820, 16))
    cache.commit([list(range(820))])
    cache.end_prefill()
    q = begun(cache, site, 1).abs()
    best = [1, 3, 5, 7, 9, 11] if twins == 2 else [0, 1, 2, 3, 4, 5]
    want = best if by == "pages" else [16 * p + i for p in best for i in range(16)]
    assert [picks.tolist() for picks in listed(cache, q)[0][0]] == [want, want]


def test_the_budget_cuts_a_run_of_equal_tokens():
    site = replace(PLAIN, retrieve=Retrieve("scan", 41))
    cache = prompted(site, [900])
    cache.segments[0].bodies[0].keys["data"].zero_()
    assert listed(cache, begun(cache, site, 1))[0][0][0].tolist() == list(range(41))


@pytest.mark.parametrize("count", [17, 100, 1000])
def test_lists_follow_a_cache_that_grows(count):
    for site in (PAGES, SCAN):
        cache = prompted(site, [120])
        q = begun(cache, site, 1)
        (call,), lists = retrieve(cache, 0, q, 0.3)
        unit = Unit([call])
        for step in range(count):
            if step:
                cache.begin(torch.tensor([cache.lengths]))
            cache.append(0, normal(1, 2, 1, 64, seed=step), torch.zeros(1, 2, 1, 16))
            cache.commit([[0]])
        cache.begin(torch.tensor([cache.lengths]))
        unit()
        fresh = listed(cache, q)[0][0]
        mine = [lists.entries[0, 0, g, : lists.counts[0, 0, g]].tolist() for g in range(2)]
        assert mine == [picks.tolist() for picks in fresh]
        assert error(cache, site, q) < TOLERANCE


def test_numbers_that_are_none_do_no_harm():
    for site in (PAGES, SCAN):
        cache = prompted(site, [900])
        q = begun(cache, site, 1).clone()
        q[:, 1] = float("nan")
        (lists,) = listed(cache, q)[0]
        for picks in lists:
            assert len(picks) == min(site.retrieve.budget, 96 if site is PAGES else 70) // (16 if site is PAGES else 1)
            assert bool((picks.diff() > 0).all())


PAGE_MUTANTS = {
    "h % G": ("at.query(b, g * R + r, first + t)", "at.query(b, r * G + g, first + t)"),
    "one bound for both signs": ("load<f32x16>(low + i * DP + d)", "load<f32x16>(high + i * DP + d)"),
    "the mean of the heads": ("most = larger(most, sums(dots))", "most = (r ? most : f32x16{}) + sums(dots)"),
    "the last page dropped": ("(place < (int32_t)end)", "(place < (int32_t)end - (end == held))"),
    "another slot": ("at.table + (b * G + g) * at.columns;\n  for", "at.table + b * G * at.columns;\n  for"),
    "one too few": ("best_from(x, from, held, MOST, out)", "best_from(x, from, held, MOST - 1, out)"),
}  # fmt: skip
SCAN_MUTANTS = {
    "h % G": ("at.query(b, g * R + r, first + t)", "at.query(b, r * G + g, first + t)"),
    "no softmax": ("/ total);", "/ 1.0f);"),
    "no scale": ("read(x + d, D - d) * at.scale", "read(x + d, D - d)"),
    "5 % scale": ("read(x + d, D - d) * at.scale", "read(x + d, D - d) * at.scale * 1.05f"),
    "chunks of their own": ("exponential(load<f32x16>(state.most + c * HP + h) - most) / total", "1.0f / total"),
    "a head left out": ("for (i64 h = 0; h < H; h++) sum", "for (i64 h = 1; h < H; h++) sum"),
    "the last chunk dropped": ("(place < (int32_t)many)", "(place < (int32_t)(c + 1 < chunks ? many : 0))"),
    "another page's key": ("slot = table[token / CAP]", "slot = table[token / CAP / 2]"),
}  # fmt: skip
REACH_MUTANTS = {
    "pages out of reach": ("pages in a window", "- last < WINDOW)", "- last < WINDOW + 160)"),
    "a page half in reach": ("pages in a window", "n = at.pages[2 * slot] - 1;", "n = 0;"),
    "survivors as neighbours": ("survivors in a window", "at.places ? at.places[slot * CAP + n]", "0 ? 0"),
    "tokens out of reach": ("scan in a window", "- WINDOW + 1 -", "- WINDOW - 160 -"),
    "no cap": ("scan in a window", "if (at.softcap > 0)", "if (0)"),
}


@pytest.mark.parametrize(("right", "wrong"), PAGE_MUTANTS.values(), ids=PAGE_MUTANTS)
def test_the_comparison_catches_wrong_pages(right, wrong):
    _caught(PAGES, right, wrong)


@pytest.mark.parametrize(("right", "wrong"), SCAN_MUTANTS.values(), ids=SCAN_MUTANTS)
def test_the_comparison_catches_wrong_tokens(right, wrong):
    _caught(SCAN, right, wrong)


@pytest.mark.parametrize(("name", "right", "wrong"), REACH_MUTANTS.values(), ids=REACH_MUTANTS)
def test_the_comparison_catches_a_wrong_reach(name, right, wrong):
    pages = SITES[name].retrieve.by == "pages"  # so few in reach that all of them are read
    _caught(replace(SITES[name], window=90) if pages else SITES[name], right, wrong)


def _caught(site: Site, right: str, wrong: str) -> None:
    cache = prompted(site, [1801])
    q = begun(cache, site, 4)
    q[:, 1::2] *= 0.2  # heads whose shares are even, and heads that attend to few tokens
    body = cache.segments[0].bodies[0]
    if site is PAGES:  # the last page is the best
        body.side["high"][body.host_table[0, :, 110].long()] += 9
    assert error(cache, site, q) < TOLERANCE
    with mutant(right, wrong):
        assert error(cache, site, q) > 20 * TOLERANCE


def test_scores_below_zero_are_in_order():
    cache = prompted(PAGES, [1801])
    q = begun(cache, PAGES, 2).abs()
    low = cache.segments[0].bodies[0].side["low"]
    cache.segments[0].bodies[0].side["high"].copy_(-low.abs())
    low.copy_(-2 * low.abs())
    assert error(cache, PAGES, q) < TOLERANCE
    with mutant("return bits ^ ((bits >> 31) & 0x7fffffff);", "return bits;"):
        assert error(cache, PAGES, q) > 20 * TOLERANCE


def test_ties_cut_from_the_wrong_end_are_caught():
    site = replace(PLAIN, retrieve=Retrieve("scan", 41))
    cache = prompted(site, [900])
    cache.segments[0].bodies[0].keys["data"].zero_()
    q = begun(cache, site, 1)
    with mutant("LANE + (int32_t)i < (int32_t)end", "LANE + (int32_t)i >= (int32_t)(padded - end)"):
        assert listed(cache, q)[0][0][0].tolist() != list(range(41))


def test_a_layer_reuses_the_list_of_an_earlier_one():
    first = replace(PLAIN, retrieve=Retrieve("dense", 70))
    second = replace(PLAIN, layer=1, retrieve=Retrieve("reuse", 70, 0))
    cache = Cache(CachePlan((first, second)), 1, 64)
    q = torch.zeros(1, 8, 1, 64)
    with pytest.raises(SmeltError, match="layer 1 reads the list of layer 0, which must run before it"):
        retrieve(cache, 1, q, 0.3)
    calls, lists = retrieve(cache, 0, q, 0.3)
    assert len(calls) == 1 and lists is None
    calls, lists = retrieve(cache, 1, q, 0.3)
    assert calls == [] and lists is module._LISTS[cache][0, 1]
    for other in (
        replace(second, page=8),
        replace(second, window=9),
        replace(second, retrieve=Retrieve("reuse", 70, 1)),
    ):
        with pytest.raises(
            SmeltError, match=r"layer 1 reads the list of layer ., .* the same KV heads, window, sink, tail and page"
        ):
            Cache(CachePlan((first, other)), 1, 64)
    assert retrieve(Cache(CachePlan((PLAIN,)), 1, 64), 0, q, 0.3) == ([], None)


def test_what_it_cannot_read_is_named():
    cache = Cache(CachePlan((SCAN,)), 1, 64)
    with pytest.raises(ValueError, match=r"layer 0: retrieval takes a float32 query \[1, 8, 2, 64\]"):
        retrieve(cache, 0, torch.zeros(1, 4, 2, 64), 0.3)
