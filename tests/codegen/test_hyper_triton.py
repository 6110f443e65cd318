"""The Triton kernels of HyperAttention: against the reference in the interpreter, and compiled for two GPUs."""

from dataclasses import replace

import pytest
import torch

from smelt.codegen.autotune_triton import Tile
from smelt.codegen.hyper_triton import STAGES, TritonHyperAttention, signature, warps
from smelt.codegen.lower import lower
from smelt.ir.cache import Cache, CachePlan, Site
from smelt.ir.cache.hyper import Hyper, hyper_attend
from smelt.ir.interpret import interpret
from smelt.passes.cache.insert import Insert
from smelt.runtime.session import Session

from ..ir.programs import captured
from .triton_checks import INTERPRETED, compiled, in_the_interpreter, interpreted, usage

pytest.importorskip("triton")

PLAIN = Site(layer=0, heads=4, kv_heads=2, key_dim=32, value_dim=32)
SITES = {"float32": PLAIN, "float16": replace(PLAIN, heads=2, key_dim=48, value_dim=24, dense="float16")}
SMALL = Hyper(block=32, sample=32, projections=5, min_seq_len=64, sink=2)
OPTIONS = {"small": SMALL, "odd": Hyper(block=40, sample=17, projections=4, min_seq_len=50, sink=0)}
TOLERANCE = {"float32": 3e-6, "float16": 3e-3}  # float16: 11 bits in the weights and in the scaled query


def error(site: Site, options: Hyper, lengths: list[int], device: str = "cpu") -> float:
    """The largest difference from the reference, and infinity where padding is not 0."""
    random, tokens = torch.Generator().manual_seed(0), max(lengths)
    cache = Cache(CachePlan((site,)), len(lengths), tokens + 8, device)
    q, k, v = (
        torch.randn(len(lengths), heads, tokens, dim, generator=random)
        for heads, dim in ((site.heads, site.key_dim), (site.kv_heads, site.key_dim), (site.kv_heads, site.value_dim))
    )
    stored: torch.dtype = getattr(torch, site.dense)
    k, v = k.to(stored).float(), v.to(stored).float()
    valid = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    cache.begin((torch.arange(tokens) * valid).to(device), valid.to(device))
    padded = ~valid[:, None, :, None]
    cache.append(0, k.masked_fill(padded, torch.nan).to(device), v.masked_fill(padded, torch.nan).to(device))
    out = torch.full((len(lengths), tokens, site.heads, site.value_dim), float("nan"), device=device).transpose(1, 2)
    TritonHyperAttention(site, options)(cache, 0, q.to(device), out, 0.2)
    worst = 0.0
    for row, n in enumerate(lengths):
        want = torch.zeros(site.heads, tokens, site.value_dim)
        want[:, :n] = hyper_attend(q[row, :, :n], k[row, :, :n], v[row, :, :n], 0.2, options)
        worst = max(worst, float((out[row].cpu() - want).abs().nan_to_num(nan=torch.inf).max()))
    return worst


@interpreted
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("site", SITES.values(), ids=SITES)
def test_the_kernels_compute_the_reference(site, options):
    assert error(site, options, [150, 1, 65]) < TOLERANCE[site.dense]


@interpreted
def test_short_prompts_need_no_launch_but_the_first():
    assert error(PLAIN, SMALL, [64, 33]) < TOLERANCE["float32"]


@interpreted
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (".to(tl.float32) * scale", ".to(tl.float32) * scale * 1.05"),
        ("tl.log(tl.maximum(outside, 1).to(tl.float32) / tl.maximum(drawing, 1))", "0.0 * outside"),
        ("r < mine, r, r + (upto - mine)", "r < mine, r, r"),
        ("(place[None, :] < limit[:, None])", "(place[None, :] >= 0)"),
        ("acc = mixed * total[:, None]", "acc = mixed"),
        ("h // $group", "h % $groups"),
        ("0, tl.minimum(first, $sink), $tile", "0, 0, $tile"),
    ],
)
def test_the_comparison_catches_a_wrong_kernel(right, wrong, monkeypatch):
    from string import Template

    from smelt.codegen import hyper_triton

    text = hyper_triton.KERNEL.template
    assert right in text
    monkeypatch.setattr(hyper_triton, "KERNEL", Template(text.replace(right, wrong)))
    assert error(PLAIN, SMALL, [150]) > 100 * TOLERANCE["float32"]


@pytest.mark.skipif(INTERPRETED, reason="is the parent process")
def test_everything_holds_in_the_interpreter():
    in_the_interpreter(__file__)


@compiled
@pytest.mark.parametrize(
    ("dense", "width", "capability"), [("float16", 128, 80), ("float16", 128, 90), ("float32", 64, 90)]
)
def test_the_kernels_compile_for_a_gpu_without_spilling(dense, width, capability, tmp_path):
    site = Site(layer=0, heads=32, kv_heads=8, key_dim=width, value_dim=width, dense=dense)
    kernels = TritonHyperAttention(site, Hyper())
    for name, types in signature(site).items():
        used = usage(getattr(kernels, name), types, {}, Tile(warps=warps(site), stages=STAGES), capability, tmp_path)
        assert used.spilled == 0, (name, used)
        assert used.shared <= 99 * 1024 and used.registers * 32 * warps(site) <= 65536


@pytest.mark.gpu
@pytest.mark.parametrize("site", SITES.values(), ids=SITES)
def test_the_kernels_compute_the_reference_on_a_gpu(site):
    assert error(site, SMALL, [700, 1, 65], "cuda") < 10 * TOLERANCE[site.dense]


@interpreted
def test_a_session_reads_prompts_so():
    program = captured("llama")
    Insert("float32").apply(program, None)
    options = Hyper(block=16, sample=16, projections=4, min_seq_len=16)
    program.cache = CachePlan(tuple(replace(site, hyper=options) for site in program.cache.sites))
    tokens = torch.arange(45)[None] % 40
    cache = Cache(program.cache, 1, 60)
    cache.begin(torch.arange(45)[None])
    want = interpret(program, {"tokens": tokens, "positions": torch.arange(45)[None]}, cache)["logits"][:, -1]
    logits = Session(lower(program, "triton"), 1, 60).prefill([tokens[0].tolist()])["logits"]
    assert (logits - want).abs().max() < 1e-4 * want.abs().max()
