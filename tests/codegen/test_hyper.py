"""The C++ kernel of HyperAttention against its reference: ragged prompts, stored types, padding, wrong kernels."""

from dataclasses import replace

import pytest
import torch

from smelt.codegen.hyper import HyperAttention, covers
from smelt.codegen.hyper_layout import layout
from smelt.ir.cache import Cache, CachePlan, Site
from smelt.ir.cache.hyper import Hyper, hyper_attend, levels
from smelt.ir.errors import SmeltError

from .mutants import mutant

PLAIN = Site(layer=0, heads=4, kv_heads=2, key_dim=64, value_dim=64)
SITES = {
    "float32": PLAIN,
    "float16": replace(PLAIN, heads=2, key_dim=80, value_dim=72, dense="float16"),
    "bfloat16": replace(PLAIN, key_dim=24, value_dim=128, dense="bfloat16"),
}
SMALL = Hyper(block=32, sample=32, projections=6, min_seq_len=64, sink=2)
OPTIONS = {
    "small": SMALL,
    "odd": Hyper(block=33, sample=17, projections=9, min_seq_len=70, sink=0),
    "all": replace(SMALL, sample=500),
}
LENGTHS = [333, 1, 65]
TOLERANCE = 3e-6  # float32; both sides read the keys and values that are stored


def error(site: Site, options: Hyper, lengths: list[int] = LENGTHS, layer: int = 0) -> float:
    """The largest difference from the reference, and infinity where padding is not 0."""
    random, tokens, site = torch.Generator().manual_seed(0), max(lengths), replace(site, layer=layer)
    cache = Cache(CachePlan((site,)), len(lengths), tokens + 8)
    q, k, v = (
        torch.randn(len(lengths), heads, tokens, dim, generator=random)
        for heads, dim in ((site.heads, site.key_dim), (site.kv_heads, site.key_dim), (site.kv_heads, site.value_dim))
    )
    valid = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    for x in (k, v):
        x[~valid[:, None].expand(x.shape[:3])] = float("nan")
    cache.begin(torch.arange(tokens) * valid, valid)
    cache.append(layer, k, v)
    out = torch.full((len(lengths), tokens, site.heads, site.value_dim), float("nan")).transpose(1, 2)
    HyperAttention(site, options).bind(cache, layer, q, out, 0.125)()
    stored: torch.dtype = getattr(torch, site.dense)
    worst = 0.0
    for row, n in enumerate(lengths):
        taken = (x[row, :, :n] for x in (q, k.to(stored).float(), v.to(stored).float()))
        want = torch.zeros(site.heads, tokens, site.value_dim)
        want[:, :n] = hyper_attend(*taken, 0.125, options, layer)
        worst = max(worst, float((out[row] - want).abs().nan_to_num(nan=torch.inf).max()))
    return worst


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("site", SITES.values(), ids=SITES)
def test_the_kernel_computes_the_reference(site, options):
    assert error(site, options) < TOLERANCE


@pytest.mark.parametrize("lengths", [[64], [63, 64], [129], [256, 257]])
def test_prompts_of_any_length(lengths):
    assert error(PLAIN, SMALL, lengths) < TOLERANCE


def test_layers_draw_apart():
    assert error(PLAIN, SMALL, layer=3) < TOLERANCE
    assert HyperAttention(PLAIN, SMALL).function == HyperAttention(replace(PLAIN, layer=3), SMALL).function


MUTANTS = {
    "5 % scale": ("x[d] * at.scale", "x[d] * at.scale * 1.05f"),
    "without ln(outside / m)": ("logf((float)outside / many)", "0.0f * many"),
    "block's own keys in the sample": ("keys[r < low ? r : r + high - low]", "keys[r]"),
    "near keys twice": ("block.limit[i] = start_of(at, p.row, mine[rank + i])", "block.limit[i] = INT32_MAX - 1"),
    "a rectangle's block left out": ("at.until[level] - from) * H", "at.until[level] - from - 1) * H"),
    "unsorted keys": ("code ^= code >> shift", "code ^= 0"),
    "what was seen before forgotten": ("most[i] = held[0], total[i][0] = held[1];", "continue;"),
    "no sinks": ("first < SINK ? first : SINK, [](int64_t n)", "0, [](int64_t n)"),
    "the token itself unseen": ("block.limit[i] = t + i + 1", "block.limit[i] = t + i + !(t + i)"),
    "wrong KV head": ("(b * G + h / R) * at.width * E", "(b * G + h % G) * at.width * E"),
    "padding left as it was": ("E * sizeof(float)", "0"),
}


@pytest.mark.parametrize(("right", "wrong"), MUTANTS.values(), ids=MUTANTS)
def test_the_comparison_catches_a_wrong_kernel(right, wrong):
    with mutant(right, wrong):
        assert error(PLAIN, SMALL) > 100 * TOLERANCE


def test_the_layout_holds_every_block_once():
    tables = layout((333, 20, 200), 340, SMALL)
    assert [len(levels(n, SMALL)) for n in (333, 20, 200)] == [3, 0, 2]
    assert tables.until.tolist() == [int((tables.parts[:, 4] <= level).sum()) for level in range(3)]
    assert len(tables.exact) == -(-333 // 32) + 1 + -(-200 // 32) and tables.starts.shape == (3, 11)
    assert (tables.parts[:, 5] < tables.parts[:, 6]).all()
    assert len({tuple(part) for part in tables.parts.tolist()}) == len(tables.parts)
    assert sorted(tables.exact[:, 2].tolist()) != tables.exact[:, 2].tolist()  # the longest first


def test_only_whole_prompts_are_read():
    cache = Cache(CachePlan((PLAIN,)), 1, 300)
    q, k, v = torch.randn(1, 4, 100, 64), torch.randn(1, 2, 100, 64), torch.randn(1, 2, 100, 64)
    call = HyperAttention(PLAIN, SMALL).bind(cache, 0, q, torch.empty(1, 4, 100, 64), 0.125)
    with pytest.raises(RuntimeError, match="no step: call begin and append before attending"):
        call()
    cache.begin(torch.arange(100)[None])
    cache.append(0, k, v)
    call()
    cache.commit([list(range(100))])
    cache.begin(torch.arange(100, 200)[None])
    with pytest.raises(ValueError, match="layer 0: HyperAttention reads whole prompts, and this step continues a row"):
        call()


def test_padding_in_front_is_refused():
    cache, valid = Cache(CachePlan((PLAIN,)), 1, 300), torch.arange(100)[None] > 3
    call = HyperAttention(PLAIN, SMALL).bind(cache, 0, torch.randn(1, 4, 100, 64), torch.empty(1, 4, 100, 64), 0.125)
    cache.begin((torch.arange(100)[None] - 4) * valid, valid)
    with pytest.raises(ValueError, match="layer 0: HyperAttention takes prompts that are padded behind their last"):
        call()


def test_what_has_no_kernel():
    windowed = replace(PLAIN, window=90)
    assert covers(windowed) == "a window of 90 tokens bounds what a query reads already"
    with pytest.raises(SmeltError, match="layer 0: no HyperAttention: a window of 90 tokens"):
        HyperAttention(windowed, SMALL)
