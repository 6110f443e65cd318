"""The C++ attention kernel: right against the reference, and the same bits whatever else the step brings."""

import gc
import weakref
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import sympy
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from smelt.codegen.attention import SegmentAttention, covers
from smelt.codegen.attention_loaders import Body
from smelt.codegen.attention_source import forms
from smelt.ir.cache import Cache, CachePlan, Select, Site
from smelt.ir.encoding import Affine, Dense
from smelt.ir.encoding.expr import Cast, Load, k
from smelt.ir.errors import SmeltError

from .attention_checks import TOLERANCE, after, attend, chain, fresh, kernel, prompted
from .mutants import mutant

PLAIN = Site(layer=0, heads=4, kv_heads=2, key_dim=64, value_dim=64)
PAGED = replace(PLAIN, sink=4, tail=64, page=64)
SITES = {
    "dense": PLAIN,
    "kivi": replace(PAGED, keys=Affine(4, 32, "channel", True), values=Affine(4, 32, "token", True), dense="float16"),
    "odd": replace(
        PAGED,
        **{"heads": 2, "key_dim": 80, "value_dim": 72, "tail": 32, "page": 32, "dense": "bfloat16"},
        keys=Affine(8, 16, "channel"),
        values=Affine(8, 0),
    ),
    "window": replace(
        PAGED,
        window=90,
        keys=Affine(4, 0, "token", True),
        values=Affine(4, 32, "channel", True),
        select=Select("key_norm", 0.5, 128),
    ),
    "two bits": replace(
        PAGED, heads=14, keys=Affine(2, 16, "channel", True), values=Affine(2, 64), tail=33, page=48, sink=0
    ),
    "stream": replace(PAGED, window=70, tail=70, select=Select("recency", budget=0)),
    "halves": replace(PAGED, heads=2, page=5, tail=3, keys=Dense("float16"), values=Dense("bfloat16"), value_dim=24),
}
LENGTHS = [0, 1, 63, 129, 708]  # 708: of 90 positions in a window, 26 lie in the body
every_site = pytest.mark.parametrize("site", SITES.values(), ids=SITES)


@every_site
@pytest.mark.parametrize("tokens", [1, 3, 65])
def test_the_kernel_computes_the_reference(site, tokens):
    cache = prompted(site, LENGTHS)
    q, keys, values = fresh(site, len(LENGTHS), tokens, 1)
    cache.begin(after(cache, tokens))
    cache.append(0, keys, values)
    for softcap, sinks in ((None, None), (5.0, None), (None, torch.linspace(-2, 3, site.heads))):
        want = cache.attend(0, q, 0.125, site.window, softcap, sinks)
        assert (attend(cache, q, softcap, sinks) - want).abs().max() < TOLERANCE
    peaked = attend(cache, q * 30)
    assert (peaked - cache.attend(0, q * 30, 0.125, site.window)).abs().max() < 30 * TOLERANCE


MUTANTS = {
    "5 % scale": ("kivi", "x[d] * call.scale", "x[d] * call.scale * 1.05f"),
    "a dropped token": ("kivi", "(live >> (16 * h))", "((live & ~2u) >> (16 * h))"),
    "window too wide": ("window", "- places[i] >= WINDOW", "- places[i] > WINDOW"),
    "tail window too narrow": ("stream", "position(t) - WINDOW + 1 - first", "position(t) - WINDOW + 2 - first"),
    "a chunk without its factor": ("kivi", "total += part * factor;", "total += part;"),
    "wrong head": ("dense", "slot * R + h % R", "slot * R + (h + 1) % R"),
    "no new tokens": ("dense", "kept + sees.count < last ? kept + sees.count : last", "kept < last ? kept : last"),
    "a chain without its end": ("dense", "own = kept + t0 + t + 1 - l", "own = kept + t0 + t - l"),
    "every tree a chain": ("dense", "chains &= ", "chains |= "),
}


@pytest.mark.parametrize(("name", "right", "wrong"), MUTANTS.values(), ids=MUTANTS)
def test_the_comparison_catches_a_wrong_kernel(name, right, wrong):
    site = SITES[name]
    cache = prompted(site, [132, 708])
    q, keys, values = fresh(site, 2, 3, 1)
    with mutant(right, wrong):
        errors = []
        for seen in (chain([0, 0, 1]), chain([0, 0, 0])):  # one after the other, and two behind the first
            cache.begin(torch.tensor(cache.lengths)[:, None] + seen.sum(1) - 1, ancestors=seen)
            cache.append(0, keys, values)
            errors.append((attend(cache, q) - cache.attend(0, q, 0.125, site.window)).abs().max())
    assert max(errors) > 100 * TOLERANCE


@every_site
@pytest.mark.parametrize("length", [0, 29, 32, 505, 700])
def test_a_token_in_a_tree_gets_the_bits_it_gets_alone(site, length):
    """Every node of a tree equals the last of its path, decoded one by one; across tile and chunk borders."""
    parents = [0, 0, 0, 1, 1, 4, 5, 2, 3]
    seen = chain(parents)
    path = [0, 1, 4, 5, 6]
    q, keys, values = fresh(site, 1, len(parents), 1)
    cache = prompted(site, [length])
    path = path[: cache.room()[0]]
    cache.begin(length + (seen.sum(1) - 1)[None], ancestors=seen)
    cache.append(0, keys, values)
    tree = attend(cache, q)
    assert (tree - cache.attend(0, q, 0.125, site.window)).abs().max() < TOLERANCE
    for step, node in enumerate(path):
        cache.begin(torch.tensor([[length + step]]))
        cache.append(0, keys[:, :, [node]], values[:, :, [node]])
        assert torch.equal(attend(cache, q[:, :, [node]])[:, :, 0], tree[:, :, node])
        cache.commit([[0]])


@every_site
def test_the_bits_do_not_depend_on_how_many_tokens_come(site):
    q, keys, values = fresh(site, 1, 65, 1)
    cache = prompted(site, [500])
    outs = []
    for tokens in (65, 17, 2):
        cache.begin(after(cache, tokens))
        cache.append(0, keys[:, :, :tokens], values[:, :, :tokens])
        outs.append(attend(cache, q[:, :, :tokens]))
    assert torch.equal(outs[0][:, :, :17], outs[1]) and torch.equal(outs[1][:, :, :2], outs[2])


@every_site
def test_a_row_gets_the_same_bits_in_any_batch_and_on_any_threads(site, monkeypatch):
    lengths = [700, 3, 129]
    cache = prompted(site, lengths)
    q, keys, values = fresh(site, 3, 2, 1)

    def run(cache, rows):
        cache.begin(after(cache, 2))
        cache.append(0, keys[rows], values[rows])
        return attend(cache, q[rows])

    together = run(cache, [0, 1, 2])
    monkeypatch.setenv("SMELT_THREADS", "1")
    assert torch.equal(run(cache, [0, 1, 2]), together)
    for row in range(3):
        alone = prompted(site, lengths)
        alone.select_rows([row])
        assert torch.equal(run(alone, [row]), together[row : row + 1])


def test_padding_reads_nothing_and_yields_zeros():
    site = SITES["kivi"]
    cache = prompted(site, [129, 63, 0])
    q, keys, values = fresh(site, 3, 4, 1)
    valid = torch.tensor([[True, True, False, False], [False, False, False, False], [True, True, True, True]])
    for x in (q, keys, values):
        x[~valid[:, None].expand(x.shape[:3])] = float("nan")
    cache.begin(after(cache, 4), valid)
    cache.append(0, keys, values)
    out = attend(cache, q)
    assert (out[~valid[:, None].expand(out.shape[:3])] == 0).all()
    assert (out - cache.attend(0, q, 0.125)).abs().max() < TOLERANCE


def test_a_nan_in_a_real_query_shows():
    cache = prompted(PLAIN, [40])
    q, keys, values = fresh(PLAIN, 1, 2, 1)
    q[0, 1, 1, 3] = float("nan")
    cache.begin(after(cache, 2))
    cache.append(0, keys, values)
    out = attend(cache, q)
    assert out[0, 1, 1].isnan().all() and out[0, 1, 0].isfinite().all() and out[0, 0].isfinite().all()


def test_any_strides_will_do():
    site = SITES["kivi"]
    cache = prompted(site, [129, 63])
    q, keys, values = fresh(site, 2, 3, 1)
    cache.begin(after(cache, 3))
    cache.append(0, keys, values)
    wide = torch.full((2, 3, 4, 2 * 64), float("nan"))
    out = wide[..., :64].transpose(1, 2)
    kernel(site).bind(cache, 0, q.transpose(1, 2).contiguous().transpose(1, 2), out, 0.125)()
    assert torch.equal(out, attend(cache, q)) and wide[..., 64:].isnan().all()


def test_addresses_follow_the_buffers():
    """Growth by a long step, the end of the prompt, and dropped rows move buffers under a bound call."""
    site = SITES["kivi"]
    cache = Cache(CachePlan((site,)), 3, 900, scratch=4)
    buffers = {tokens: (fresh(site, 3, tokens, tokens)[0], torch.empty(3, 4, tokens, 64)) for tokens in (1, 3)}
    bound = {tokens: kernel(site).bind(cache, 0, q, out, 0.125) for tokens, (q, out) in buffers.items()}

    def check(tokens):
        rows = cache.batch
        _, keys, values = fresh(site, rows, tokens, sum(cache.lengths))
        cache.begin(after(cache, tokens))
        cache.append(0, keys, values)
        if tokens in bound:
            q, out = buffers[tokens]
            out.fill_(float("nan"))
            bound[tokens]()
            assert (out[:rows] - cache.attend(0, q[:rows], 0.125)).abs().max() < TOLERANCE
        cache.commit([list(range(tokens))] * rows)

    check(3)
    check(1)
    check(300)
    check(3)
    cache.end_prefill()
    check(1)
    check(200)
    check(3)
    cache.select_rows([2, 0])
    check(1)


def test_layers_of_one_kind_share_a_kernel():
    site = SITES["kivi"]
    cache = Cache(CachePlan((site, replace(site, layer=1))), 1, 900)
    q, keys, values = fresh(site, 1, 300, 0)
    cache.begin(after(cache, 300))
    cache.append(0, keys, values)
    cache.append(1, -keys, values + 1)
    for layer in (0, 1):
        out = torch.full((1, 4, 300, 64), float("nan"))
        kernel(site).bind(cache, layer, q, out, 0.125)()
        assert (out - cache.attend(layer, q, 0.125)).abs().max() < TOLERANCE


class Ops(TorchDispatchMode):
    """Lists the operators that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_call_allocates_no_tensor():
    cache = prompted(PLAIN, [40])
    q, keys, values = fresh(PLAIN, 1, 1, 1)
    bound = kernel(PLAIN).bind(cache, 0, q, torch.empty(1, 4, 1, 64), 0.125)
    cache.begin(after(cache, 1))
    cache.append(0, keys, values)
    bound()  # the first layer of a step makes its bitset
    with Ops() as ops:
        bound()
    assert ops.seen == []


def test_a_dropped_cache_is_freed():
    cache = prompted(PLAIN, [40])
    cache.begin(after(cache, 1))
    cache.append(0, *fresh(PLAIN, 1, 1, 1)[1:])
    attend(cache, fresh(PLAIN, 1, 1, 1)[0])
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("name", "tile", "keys_fold", "spans"),
    [("kivi", 32, True, 2), ("two bits", 16, True, 1), ("window", 32, False, 0), ("odd", 16, True, 0)],
)
def test_what_is_constant_leaves_the_loops(name, tile, keys_fold, spans):
    """Per-channel keys scale the query, per-token values the weights; other axes are decoded in the tile."""
    body = Body.of(forms(SITES[name])[0])
    assert (body.tile, bool(body.keys.scale), len(body.values.scale)) == (tile, keys_fold, spans)


@dataclass(frozen=True, init=False)
class Unprintable(Affine):
    """An encoding whose index arithmetic C++ has no form for."""

    name: ClassVar[str] = "unprintable"

    def expr(self, shape):
        return Cast("float32", Load("codes", sympy.Function("shuffle")(k), "uint8"))


def test_what_has_no_kernel_says_so():
    assert covers(SITES["kivi"]) is None
    site = replace(PAGED, keys=Unprintable(8, 0))
    assert "shuffle" in covers(site)
    with pytest.raises(SmeltError, match=r"layer 0: no attention kernel on this target: .*shuffle"):
        SegmentAttention(site)
    one, two = torch.zeros(1, 4, 1, 64), torch.zeros(1, 4, 2, 64)
    with pytest.raises(SmeltError, match="layer 0: its cache site differs"):
        kernel(PLAIN).bind(prompted(SITES["kivi"], [1]), 0, one, one, 1.0)
    cache = prompted(PLAIN, [1])
    bound = kernel(PLAIN).bind(cache, 0, one, one, 1.0)
    with pytest.raises(RuntimeError, match="no step"):
        bound()
    cache.begin(after(cache, 2))
    with pytest.raises(ValueError, match="layer 0: bound to 1 new tokens, the step has 2"):
        bound()
    for q, out in ((one, two), (one.half(), one), (one, one.half()), (one.repeat(2, 1, 1, 1), one), (one, one.mT)):
        with pytest.raises(ValueError, match="layer 0: attention takes float32"):
            kernel(PLAIN).bind(cache, 0, q, out, 1.0)
    with pytest.raises(ValueError, match=r"layer 0: attention takes float32 \[4\]"):
        kernel(PLAIN).bind(cache, 0, one, one, 1.0, None, torch.zeros(3))
