"""The C++ attention kernel over bodies: encodings, frames, ragged heads, tiers, merged tokens, and lists."""

from dataclasses import replace

import pytest
import torch

from smelt.codegen.attention import Picks
from smelt.ir.cache import Cache, Estimate, Merge, Retrieve, Rope, Score, Select, Site, Tier
from smelt.ir.encoding import parse

from .attention_checks import TOLERANCE, after, attend, chain, fresh, kernel, prompted
from .mutants import mutant

ROPE = Rope(tuple(10000.0 ** (-i / 32) for i in range(32)))
PAGED = Site(layer=0, heads=4, kv_heads=2, key_dim=64, value_dim=64, sink=4, tail=64, page=64)
RAGGED = Select(Score("key_norm"), keep=0.6, when="prompt", heads="adaptive")


def stored(keys: str, values: str, **options) -> Site:
    return replace(PAGED, keys=parse(keys), values=parse(values), **options)


SITES = {
    "three bits, ragged": stored(
        "affine(bits=3, group=32, axis=channel, zero=True)", "affine(bits=3, group=32, zero=True)", select=RAGGED
    ),
    "signposts, un-rotated, ragged": stored(
        "nonuniform(bits=4, axis=channel, range=calibrated)",
        "nonuniform(bits=2, kind=normal)",
        select=RAGGED,
        frame="pre",
        rope=ROPE,
    ),
    "signposts, rotated": stored(
        "nonuniform(bits=3, axis=channel, range=calibrated)", "nonuniform(bits=4, qnorm=True)"
    ),
    "codebook, un-rotated": stored(
        "codebook(dims=4, bits=6)", "codebook(dims=2, bits=4, kind=gaussian, norm=True)", frame="pre", rope=ROPE
    ),
    "low rank and sparse": stored(
        "sum(terms=[affine(bits=2, group=64, axis=channel), low_rank(rank=2), sparse(keep=0.02, axis=channel)])",
        "sum(terms=[affine(bits=2, group=64, zero=True), low_rank(rank=2), sparse(keep=0.02)])",
    ),
    "scaled channels, tiers by score, window": stored(
        "affine(bits=4, group=32, axis=channel, zero=True)",
        "channel_scaled(inner=affine(bits=4, group=0, zero=True))",
        window=300,
        select=Select(Score("key_norm"), keep=1.0, when="prompt"),
        tiers=(Tier(parse("affine(bits=2, group=32, axis=channel)"), parse("affine(bits=2, group=0)"), share=0.5),),
    ),
    "tiers by age": stored(
        "affine(bits=8, group=64, axis=channel)",
        "affine(bits=8, group=0)",
        hold=128,
        tiers=(
            Tier(parse("affine(bits=4, group=64, axis=channel)"), parse("dense(float16)"), budget=192),
            Tier(parse("affine(bits=2, group=64, axis=channel)"), parse("affine(bits=2, group=16)")),
        ),
    ),
    "merged": replace(
        PAGED,
        select=replace(RAGGED, score=Score("value_norm"), keep=0.3),
        merge=Merge(0.7),
        frame="pre",
        rope=ROPE,
        dense="bfloat16",
    ),
    "estimate": replace(PAGED, estimate=Estimate(90, 30, 2, radius=1.1), dense="float16"),
    "compact, odd": replace(
        PAGED,
        **{"heads": 7, "kv_heads": 1, "key_dim": 40, "value_dim": 24, "page": 20, "tail": 7, "dense": "float16"},
        select=Select(Score("key_norm"), keep=0.5, budget=200, when="overflow"),
        compact=True,
        frame="pre",
        rope=Rope(tuple(0.5**i for i in range(10))),
    ),
    "compact window": replace(
        PAGED, select=Select(Score("key_norm"), keep=0.5), compact=True, frame="pre", rope=ROPE, window=150
    ),
    "turned at random": stored(
        "rotated(inner=nonuniform(bits=4, kind=normal))",
        "rotated(inner=nonuniform(bits=4, kind=normal, zero=False), seed=3)",
        page=32,
        heads=6,
    ),
    "turned at random, un-rotated": stored(
        "rotated(inner=codebook(dims=2, bits=4, kind=gaussian, norm=True))", "dense(float16)", frame="pre", rope=ROPE
    ),
    "signs": stored("sign(group=0)", "affine(bits=4, group=32, zero=True)", page=16, tail=16),
}
LENGTHS = [0, 63, 129, 708]
every_site = pytest.mark.parametrize("site", SITES.values(), ids=SITES)


def step(cache: Cache, tokens: int, ancestors: torch.Tensor | None = None) -> torch.Tensor:
    """Begin a step of new tokens and append them; returns its queries."""
    site = cache.plan[0]
    q, keys, values = fresh(site, cache.batch, tokens, 1)
    places = after(cache, tokens)
    if ancestors is not None:
        places = torch.tensor(cache.lengths)[:, None] + ancestors.sum(1) - 1
    cache.begin(places, ancestors=ancestors)
    cache.append(0, keys, values)
    return q


@every_site
def test_the_kernel_computes_the_reference(site):
    cache = prompted(site, LENGTHS)
    sinks = torch.linspace(-2, 3, site.heads)
    for tokens, softcap, extra in ((1, None, None), (3, 5.0, sinks)):
        q = step(cache, tokens)
        want = cache.attend(0, q, 0.125, site.window, softcap, extra)
        assert (attend(cache, q, softcap, extra) - want).abs().max() < TOLERANCE


@every_site
def test_pages_that_leave_later_are_read(site):
    """Pages join one by one, go down tiers, overflow, and pools and page tables grow under one bound call."""
    cache = prompted(site, [150, 67])
    q, out = fresh(site, 2, 1, 5)[0], torch.empty(2, site.heads, 1, site.value_dim)
    bound = kernel(site).bind(cache, 0, q, out, 0.125)
    for turn in range(24):
        _, keys, values = fresh(site, 2, 17, turn)
        cache.begin(after(cache, 17))
        cache.append(0, keys, values)
        if site.watches:
            cache.attend(0, fresh(site, 2, 17, turn)[0], 0.125)
        cache.commit([list(range(17))] * 2)
        if turn % 4 == 3:
            cache.begin(after(cache, 1))
            cache.append(0, keys[:, :, :1], values[:, :, :1])
            bound()
            assert (out - cache.attend(0, q, 0.125, site.window)).abs().max() < TOLERANCE


@every_site
def test_a_token_in_a_tree_gets_the_bits_it_gets_alone(site):
    parents, path = [0, 0, 0, 1, 1, 4, 5], [0, 1, 4, 5]
    cache = prompted(site, [505 if site.tail == 64 else 497])
    path = path[: cache.room()[0]]
    q = step(cache, len(parents), chain(parents))
    tree = attend(cache, q)
    assert (tree - cache.attend(0, q, 0.125, site.window)).abs().max() < TOLERANCE
    _, keys, values = fresh(site, 1, len(parents), 1)
    for at, node in enumerate(path):
        cache.begin(torch.tensor([[cache.lengths[0]]]))
        cache.append(0, keys[:, :, [node]], values[:, :, [node]])
        assert torch.equal(attend(cache, q[:, :, [node]])[:, :, 0], tree[:, :, node]), at
        cache.commit([[0]])


LISTED = {
    "pages": stored("dense(float16)", "dense(bfloat16)", page=16, tail=32, retrieve=Retrieve("pages", 96)),
    "pages of codes": stored(
        "affine(bits=4, group=32, axis=channel, zero=True)",
        "affine(bits=4, group=32, zero=True)",
        retrieve=Retrieve("pages", 128),
    ),
    "tokens": stored("dense(float16)", "dense(float16)", retrieve=Retrieve("scan", 50), window=400),
    "tokens of codes, un-rotated": stored(
        "affine(bits=4, group=32, axis=channel, zero=True)",
        "nonuniform(bits=4, kind=normal)",
        retrieve=Retrieve("scan", 600),
        frame="pre",
        rope=ROPE,
    ),
}


def picked(cache: Cache, tokens: int, width: int) -> Picks:
    """The lists that the reference read in this step, with garbage behind their ends."""
    site, by_pages = cache.plan[0], cache.plan[0].retrieve.by == "pages"
    entries = torch.full((cache.batch, tokens, site.kv_heads, width), -7, dtype=torch.int32)
    counts = torch.zeros(cache.batch, tokens, site.kv_heads, dtype=torch.int32)
    for (_, row), seen in cache.picked.items():
        for g in range(site.kv_heads):
            for t in range(tokens):
                read = seen[g, t].unflatten(0, (-1, site.kept)).any(1) if by_pages else seen[g, t]
                found = torch.nonzero(read).flatten()
                entries[row, t, g, : len(found)] = found
                counts[row, t, g] = len(found)
    return Picks(entries, counts)


@pytest.mark.parametrize("site", LISTED.values(), ids=LISTED)
def test_lists_say_what_is_read_of_the_body(site):
    cache, every = (prompted(each, [20, 130, 708]) for each in (site, replace(site, retrieve=None)))
    got = {}
    for tokens in (1, 3):
        q = step(cache, tokens)
        want = cache.attend(0, q, 0.125, site.window)
        lists = picked(cache, tokens, 640)
        got[tokens] = attend(cache, q, picks=lists)
        assert (got[tokens] - want).abs().max() < TOLERANCE
        step(every, tokens)
        whole = attend(cache, q)
        assert (whole - every.attend(0, q, 0.125, site.window)).abs().max() < TOLERANCE
        assert (whole - want).abs().max() > 100 * TOLERANCE
    q, keys, values = (x[:, :, :1].contiguous() for x in fresh(site, cache.batch, 3, 1))  # the first of three, alone
    cache.begin(after(cache, 1))
    cache.append(0, keys, values)
    alone = attend(cache, q, picks=Picks(lists.entries[:, :1].contiguous(), lists.counts[:, :1].contiguous()))
    assert torch.equal(alone, got[3][:, :, :1])


MUTANTS = {
    "a dropped page": ("merged", ": in.held[b * G + g];", ": in.held[b * G + g] - 1;"),
    "every head holds as many": ("merged", "in.held[b * G + g]", "in.held[b * G]"),
    "padding is read": ("merged", "fill = in.pages[2 * slot]", "fill = CAP"),
    "another page": ("merged", "in.table + (b * G + g) * in.columns", "in.table + b * G * in.columns"),
    "5 % scale": ("signposts, rotated", "key_scale + d))", "key_scale + d) * 1.05f)"),
    "no second body": (
        "scaled channels, tiers by score, window",
        "if (c < n1) return body1(c);",
        "if (c < n1) return;",
    ),
    "wrong places": ("scaled channels, tiers by score, window", "in.places + slot * CAP", "in.places"),
    "bias ignored": ("merged", "if (bias) s", "if (0) s"),
    "wrong position": (
        "codebook, un-rotated",
        "2 * TURN * (place ? place[i] : start + i)",
        "2 * TURN * (start + i + 1)",
    ),
    "another head's table": ("codebook, un-rotated", "g * in.steps[", "0 * in.steps["),
    "sinks where they were": (
        "compact, odd",
        "at.turns + 2 * TURN * (place + first + i)",
        "at.turns + 2 * TURN * (first + i)",
    ),
    "queries not turned": ("turned at random", "held.q = spun(", "held.q = q[0][0] + 0 * (int64_t)spun("),
    "values not turned": ("turned at random", "    unspin(", "    if (0) unspin("),
    "partial turn": ("compact, odd", "i < TURN; i++", "i < TURN - 1; i++"),
}


@pytest.mark.parametrize(("name", "right", "wrong"), MUTANTS.values(), ids=MUTANTS)
def test_the_comparison_catches_a_wrong_kernel(name, right, wrong):
    site = SITES[name]
    cache = prompted(site, [132, 708])
    q = step(cache, 1)
    with mutant(right, wrong):
        wrongly = attend(cache, q)
    assert not (wrongly - cache.attend(0, q, 0.125, site.window)).abs().max() < 100 * TOLERANCE


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("n = in.picked[list]", "n = in.picked[list] - 1"),
        ("in.picks + list * in.longest", "in.picks"),
        ("LISTED[0] < n", "LISTED[0] > n"),
    ],
)
def test_the_comparison_catches_a_wrong_list(right, wrong):
    site = LISTED["pages"]
    cache = prompted(site, [132, 708])
    q = step(cache, 2)
    want = cache.attend(0, q, 0.125, site.window)
    with mutant(right, wrong):
        lists = picked(cache, 2, 640)
        lists.entries.clamp_min_(0)
        assert not (attend(cache, q, picks=lists) - want).abs().max() < 100 * TOLERANCE


def test_lists_that_cannot_be_read_are_refused():
    cache = prompted(SITES["signs"], [130])
    q = step(cache, 1)
    lists = Picks(torch.zeros(1, 1, 2, 4, dtype=torch.int32), torch.zeros(1, 1, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="layer 0: its site reads the whole body"):
        attend(cache, q, picks=lists)
    cache = prompted(LISTED["pages"], [130])
    q = step(cache, 1)
    with pytest.raises(ValueError, match=r"layer 0: counts of picks must be int32 \[1, 1, 2\]"):
        attend(cache, q, picks=Picks(lists.entries, lists.counts.long()))
