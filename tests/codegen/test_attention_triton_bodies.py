"""The Triton attention kernel over bodies of every kind: frames, tiers, ragged heads, merged tokens, lists."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from smelt.codegen import attention_triton, retrieve_triton
from smelt.codegen.attention import Picks
from smelt.codegen.attention_triton import OCCUPANCY, TritonAttention, covers, options, signature
from smelt.codegen.attention_triton_lists import blank, fill
from smelt.codegen.attention_triton_queries import append_queries
from smelt.codegen.attention_triton_source import ROWS
from smelt.codegen.autotune_triton import Tile
from smelt.ir.cache import Cache, CachePlan, Merge, Retrieve, Rope, Select, Site, Tier
from smelt.ir.encoding import Affine, Codebook, LowRank, Nonuniform, Rotated, Sparse, Sum
from smelt.ir.errors import SmeltError

from .attention_checks import fresh, plan
from .triton_checks import compiled, in_the_interpreter, interpreted, usage

pytest.importorskip("triton", reason="triton is not installed")

ROPE = Rope(tuple(100.0 ** (-i / 16) for i in range(16)))
PART = Rope(tuple(100.0 ** (-i / 5) for i in range(5)))  # of few columns, and no power of two
PAGED = Site(layer=0, heads=4, kv_heads=2, key_dim=32, value_dim=32, sink=4, tail=32, page=32)
CODED = replace(PAGED, keys=Affine(4, 32, "channel", True), values=Affine(4, 32, "token", True))
WIDE = replace(PAGED, key_dim=64, value_dim=64)
NORMAL = Rotated(Nonuniform(4, kind="normal", zero=False))
PROMPT = Select("key_norm", 0.6, when="prompt", heads="adaptive")
SITES = {
    "pre": replace(CODED, frame="pre", rope=ROPE),
    "pre, scattered": replace(
        PAGED, frame="pre", rope=PART, select=Select("key_norm", 0.5), keys=Affine(8, 0), window=90, dense="float16"
    ),
    "ragged": replace(PAGED, select=PROMPT, heads=6, page=24, tail=24),
    "merged": replace(PAGED, select=Select("random", 0.4, when="prompt"), merge=Merge(), frame="pre", rope=ROPE),
    "shares": replace(
        WIDE, select=Select("key_norm"), keys=Affine(4, 0), tiers=(Tier(Affine(2, 32), Affine(2, 32), share=0.5),)
    ),
    "ladder": replace(WIDE, hold=32, tiers=(Tier(Affine(3, 32), Affine(3, 32), budget=32), Tier(Affine(2, 32)))),
    "compact": replace(
        PAGED, frame="pre", rope=ROPE, compact=True, window=100, select=Select("recency", 1.0, 64), page=16, tail=16
    ),
    "overflow": replace(PAGED, frame="pre", rope=PART, compact=True, select=Select("key_norm", 0.5, 64, "overflow")),
    "signposts": replace(
        WIDE, frame="pre", rope=ROPE, keys=Nonuniform(3, "channel", range="calibrated"), values=Nonuniform(2),
        dense="float16",
    ),
    "codebooks": replace(PAGED, keys=Codebook(4, 6), values=Codebook(2, 4, shared=True, norm=True)),
    "sums": replace(
        WIDE,
        keys=Sum((Affine(2, 32, "channel", True), LowRank(2), Sparse(2))),
        values=Sum((Affine(2, 32, zero=True), Sparse(2, axis="channel")), "outliers"),
    ),
    "pages": replace(CODED, retrieve=Retrieve("pages", 64)),
    "pages, pre": replace(
        CODED, heads=6, frame="pre", rope=PART, window=150, retrieve=Retrieve("pages", 100), page=64, tail=64
    ),
    "tokens": replace(CODED, retrieve=Retrieve("scan", 40), dense="float16"),
    "tokens, pre": replace(PAGED, frame="pre", rope=ROPE, retrieve=Retrieve("scan", 33), keys=Affine(4, 0)),
    "rotated": replace(PAGED, keys=NORMAL, values=NORMAL),
    "rotated, tiers": replace(
        WIDE, keys=Rotated(Affine(8, 0), "orthogonal"), hold=32, tiers=(Tier(None, Rotated(Affine(8, 0), seed=1)),)
    ),
    "rotated, tokens": replace(PAGED, keys=NORMAL, values=NORMAL, retrieve=Retrieve("scan", 40), dense="float16"),
}  # fmt: skip
LENGTHS = [0, 170]
TOLERANCE = {"float32": 4e-6, "float16": 5e-3}


def prompted(site: Site, lengths: list[int] = LENGTHS) -> Cache:
    """A cache whose rows hold prompts of these lengths."""
    cache, longest = Cache(plan(site), len(lengths), 400, scratch=8), max(lengths)
    _, keys, values = fresh(site, len(lengths), longest, 0)
    keys *= torch.linspace(0.8, 1.3, site.kv_heads)[:, None, None]  # heads that keep different numbers of tokens
    valid = torch.arange(longest) < torch.tensor(lengths)[:, None]
    cache.begin(torch.arange(longest).expand(len(lengths), -1), valid)
    cache.append(0, keys, values)
    cache.commit([list(range(n)) for n in lengths])
    cache.end_prefill()
    return cache


def lists(cache: Cache, site: Site, tokens: int) -> Picks | None:
    """What the reference has just read of the body, as lists; entries that do not count are out of range."""
    if site.retrieve is None:
        return None
    many = site.retrieve.budget // (site.kept if site.retrieve.by == "pages" else 1)
    entries = torch.full((cache.batch, tokens, site.kv_heads, many), 1 << 30, dtype=torch.int32)
    counts = torch.zeros(cache.batch, tokens, site.kv_heads, dtype=torch.int32)
    for (_, row), seen in cache.picked.items():
        for g, of_head in enumerate(seen):
            for t, mask in enumerate(of_head):
                found = mask.nonzero().flatten()
                found = found // site.kept if site.retrieve.by == "pages" else found
                found = found.unique()
                entries[row, t, g, : len(found)], counts[row, t, g] = found.int(), len(found)
    return Picks(entries, counts)


def check(site: Site, tokens: int = 3, wrong: float = 1.0, lengths: list[int] = LENGTHS) -> float:
    """The greatest difference from the reference, in a step with padding."""
    cache, kernel = prompted(site, lengths), TritonAttention(site)
    q, keys, values = fresh(site, len(lengths), tokens, 1)
    valid = torch.ones(len(lengths), tokens, dtype=torch.bool)
    valid[0, tokens // 2 + 1 :] = False
    cache.begin(torch.tensor(cache.lengths)[:, None] + torch.arange(tokens), valid)
    cache.append(0, keys, values)
    sinks = torch.linspace(-2, 3, site.heads)
    wanted = cache.attend(0, q, 0.2, site.window, 5.0, sinks)
    out = torch.full_like(wanted, float("nan"))
    kernel(cache, 0, q, out, 0.2 * wrong, 5.0, sinks, lists(cache, site, tokens))
    return float((out - wanted).abs().nan_to_num(nan=torch.inf).max())


@interpreted
@pytest.mark.parametrize("name", SITES)
def test_the_kernel_computes_the_reference(name: str) -> None:
    assert check(SITES[name]) < TOLERANCE[SITES[name].dense]


@interpreted
def test_lists_of_tokens_that_share_a_block_of_rows() -> None:
    """Three heads a group: of sixteen rows the last belongs to a token whose other two are in the next block."""
    assert check(SITES["pages, pre"], 7) < TOLERANCE["float32"]


MUTANTS = {
    "5 % scale": ("pre", "* scale\n", "* scale * 1.05\n"),
    "keys as they are stored": ("pre", "key_1 * cos + key_0 * sin", "key_1"),
    "turned by places in the tile": ("pre", "base + origin, origin <", "0 * base + origin, origin <"),
    "turned by the page": ("pre, scattered", "places0 + slot * 16 + token", "places0 + slot * 16 + 0 * token"),
    "padding read": ("ragged", "(token < fill)", "(token < 24)"),
    "all heads alike": ("ragged", "tl.load(held0 + pair,", "tl.load(held0 + pair // 2 * 2,"),
    "another's pages": ("ragged", "table0 + pair * P0", "table0 + pair // 2 * 2 * P0"),
    "no bias": ("merged", "bias0 + slot * 32 + token, mask=token < fill", "bias0 + slot * 32 + token, mask=token < 0"),
    "the second body first": ("ladder", "table1 + pair * P1", "table1 + 0 * pair * P1"),
    "the last body's end": ("ladder", "high - before, n_body2)", "high - before, n_body2 - 1)"),
    "sinks where they were": ("compact", "tl.load(sink_at + pair) + ", "0 * tl.load(sink_at + pair) + "),
    "the first head's table": ("signposts", "keys0_table + g *", "keys0_table + 0 *"),
    "everybody's lists": ("pages", "(real & (t == t0 + mine))", "(real & (t >= t0))"),
    "the first list": ("pages", "list_at = (b * T + t0 + mine)", "list_at = (b * T + t0)"),
    "a list without its end": ("tokens", "(some + 31) // 32", "some // 32"),
    "a row of the page": ("tokens", "n = entry % 32", "n = entry % 32 // 2"),
    "queries rotated back": ("rotated", "keys0_spin, False", "keys0_spin, True"),
    "a value in its frame": ("rotated", "if low < before:", "if low > before:"),
    "the first tier's frame": ("rotated, tiers", "if mine0:\n            k", "if mine0 & (low < 0):\n            k"),
}


@interpreted
@pytest.mark.parametrize(("name", "right", "wrong"), MUTANTS.values(), ids=MUTANTS)
def test_the_comparison_catches_a_wrong_kernel(
    name: str, right: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = attention_triton.source(SITES[name])
    assert right in text
    monkeypatch.setattr(attention_triton, "source", lambda site: text.replace(right, wrong))
    assert check(SITES[name], 2) > {"float32": 50, "float16": 5}[SITES[name].dense] * TOLERANCE[SITES[name].dense]


SHORT = replace(PAGED, page=16, keys=Affine(8, 32, "token"))
READS = {
    "pages": replace(SHORT, retrieve=Retrieve("pages", 40)),
    "pages in a window": replace(SHORT, retrieve=Retrieve("pages", 40), window=90),
    "survivors in a window": replace(SHORT, retrieve=Retrieve("pages", 20), window=130, select=Select("key_norm", 0.5)),
    "tokens": replace(PAGED, heads=6, retrieve=Retrieve("scan", 20), softcap=1.0, keys=Affine(4, 32, "channel", True)),
    "tokens in a window": replace(SHORT, retrieve=Retrieve("dense", 20), window=90, frame="pre", rope=PART, page=24),
    "rotated tokens": replace(PAGED, retrieve=Retrieve("scan", 20), keys=NORMAL),
}


def off(site: Site, wrong: float = 1.0) -> float:
    """The share of what the reference reads that the lists of a step of two tokens leave out; 1 for malformed ones."""
    cache = prompted(site, [0, 77, 190])
    q, keys, values = fresh(site, 3, 2, 1)
    cache.begin(torch.tensor(cache.lengths)[:, None] + torch.arange(2))
    cache.append(0, keys, values)
    cache.attend(0, q, 0.2, site.window, site.softcap)
    wanted, made = lists(cache, site, 2), blank(cache, 0, 2)
    assert wanted is not None and int(wanted.counts[2].min()) > 1
    made.entries.fill_(-1)
    fill(cache, 0, wrong * q, made, 0.2, site.softcap)
    if not torch.equal(made.counts, wanted.counts):
        return 1.0
    pairs = zip(made.entries.flatten(0, 2), wanted.entries.flatten(0, 2), made.counts.flatten(), strict=True)
    missed = sum(len({*want[:n].tolist()} - {*mine[:n].tolist()}) for mine, want, n in pairs)
    return missed / int(wanted.counts.sum())


@interpreted
@pytest.mark.parametrize("name", READS)
def test_lists_are_those_of_the_reference(name: str) -> None:
    assert off(READS[name]) == 0
    assert off(READS[name], -1.0) > 0.1


@interpreted
@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("tokens", "if SOFTCAP:", "if False:"),
        ("tokens", "head = (m // 3).to(tl.int64), g * 3 + m % 3", "head = (m // 3).to(tl.int64), g * 3 + m % 2"),
        ("tokens in a window", "key_0 * cos - key_1 * sin", "key_0"),
        ("rotated tokens", "keys0_spin, False", "keys0_spin, True"),
    ],
)
def test_the_comparison_catches_wrong_logits(
    name: str, right: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = retrieve_triton.source(READS[name])
    assert right in text
    monkeypatch.setattr(retrieve_triton, "source", lambda site: text.replace(right, wrong))
    retrieve_triton.kernel.cache_clear()
    assert off(READS[name]) > 0.02
    retrieve_triton.kernel.cache_clear()


@interpreted
def test_a_layer_reuses_the_list_of_an_earlier_one() -> None:
    first = replace(PAGED, retrieve=Retrieve("dense", 40))
    cache = Cache(CachePlan((first, replace(first, layer=1, retrieve=Retrieve("reuse", 40, 0)))), 1, 64)
    with pytest.raises(SmeltError, match="layer 1 reads the list of layer 0, which must run before it"):
        blank(cache, 1, 2)
    assert blank(cache, 0, 2) is blank(cache, 1, 2)


@interpreted
def test_queries_are_kept_behind_the_tail() -> None:
    site = replace(PAGED, select=Select("attention", 0.5, when="prompt"), dense="float16", heads=6, key_dim=24)
    cache = Cache(plan(site), 2, 200)
    q, keys, values = fresh(site, 2, 50, 0)
    valid = torch.arange(50) < torch.tensor([9, 50])[:, None]
    cache.begin(torch.arange(50).expand(2, -1), valid)
    cache.append(0, keys, values)
    cache.commit([list(range(9)), list(range(50))])
    cache.begin(torch.tensor(cache.lengths)[:, None] + torch.arange(3))
    segments = cache.segments[0]
    assert segments.tail_q is not None
    segments.tail_q.fill_(7)
    fresh_q = q[:, :, :3].transpose(1, 2).contiguous().transpose(1, 2)
    append_queries(fresh_q, segments.tail_q, cache.counts(0))
    wanted = torch.full_like(segments.tail_q, 7)
    for row, length in enumerate(cache.lengths):
        wanted[row, :, length : length + 3] = q[row, :, :3]
    assert torch.equal(segments.tail_q, wanted)


@compiled
def test_what_cannot_be_read_says_why() -> None:
    assert all(covers(site) is None for site in SITES.values())
    assert "in rows that were rotated" in str(covers(replace(SITES["pre"], keys=NORMAL)))


FULL = replace(PAGED, heads=32, kv_heads=8, key_dim=128, value_dim=128, dense="float16", tail=128, page=64)
KIVI = replace(FULL, keys=Affine(4, 64, "channel", True), values=Affine(4, 64, "token", True))
TURNED = {"frame": "pre", "rope": Rope(tuple(1e4 ** (-i / 64) for i in range(64)))}
LARGE = {
    "post": KIVI,
    "pre": replace(KIVI, **TURNED),
    "signposts": replace(FULL, **TURNED, keys=Nonuniform(3, "channel", range="calibrated"), values=Nonuniform(3)),
    "codebook": replace(FULL, keys=Codebook(4, 8), values=Codebook(4, 8)),
    "pages": replace(KIVI, retrieve=Retrieve("pages", 1024)),
    "tokens": replace(KIVI, retrieve=Retrieve("scan", 1024)),
    "rotated": replace(FULL, keys=NORMAL, values=NORMAL),
}
AHEAD = [*((name, 80) for name in LARGE), *((name, 90) for name in ("pre", "tokens", "rotated"))]


@compiled
@pytest.mark.parametrize(("name", "capability"), AHEAD)
def test_it_compiles_for_a_gpu_without_spilling(name: str, capability: int, tmp_path: Path) -> None:
    site = LARGE[name]
    choice, types = options(site), signature(site, lists=site.retrieve is not None)["attend"]
    constants = {"SINKS": False, "SOFTCAP": False, "PAIRS": 8, "M": ROWS}
    tile = Tile(warps=choice["num_warps"], stages=choice["num_stages"])
    used = usage(TritonAttention(site).attend, types, constants, tile, capability, tmp_path)
    assert used.spilled == 0
    assert used.shared * OCCUPANCY <= 128 * 1024 and used.registers * 32 * tile.warps * OCCUPANCY <= 65536


@compiled
@pytest.mark.parametrize(("name", "capability"), [("post", 80), ("pre", 90), ("rotated", 80)])
def test_logits_compile_without_spilling(name: str, capability: int, tmp_path: Path) -> None:
    site = replace(LARGE[name], retrieve=Retrieve("scan", 1024))
    tile = Tile(warps=options(site)["num_warps"], stages=options(site)["num_stages"])
    constants, types = {"SOFTCAP": True, "M": ROWS}, retrieve_triton.signature(site)
    assert usage(retrieve_triton.kernel(site), types, constants, tile, capability, tmp_path).spilled == 0


@compiled
def test_everything_holds_in_the_interpreter() -> None:
    in_the_interpreter(__file__)
