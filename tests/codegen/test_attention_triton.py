"""The Triton attention kernel: against the reference in Triton's interpreter, and compiled for two GPUs without one."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from smelt.codegen.attention_triton import ROWS, TritonAttention, covers, signature
from smelt.ir.cache import Cache, CachePlan, Select, Site
from smelt.ir.encoding import Affine

pytest.importorskip("triton")

PLAIN = Site(layer=0, heads=4, kv_heads=2, key_dim=32, value_dim=32)
PAGED = replace(
    PLAIN, sink=4, tail=32, page=32, keys=Affine(4, 32, "channel", True), values=Affine(4, 32, "token", True)
)
SITES = {
    "dense": PLAIN,
    "halves": replace(PLAIN, dense="float16", key_dim=48, value_dim=16),
    "kivi": PAGED,
    "kivi halves": replace(PAGED, dense="float16"),
    "window": replace(PAGED, window=50, keys=Affine(4, 0), values=None, select=Select("key_norm", 0.75, 96), heads=2),
    "stream": replace(PLAIN, sink=4, tail=40, window=44, select=Select("recency", budget=0)),
}
LENGTHS = [0, 77]  # 77: four sinks, one page, 41 in the tail
TOLERANCE = {"float32": 3e-6, "float16": 3e-3}  # float16: 11 bits in the weights and in the scaled query
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a child process, under TRITON_INTERPRET=1")


def fresh(site: Site, rows: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v of `tokens` new tokens."""
    random = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, site.heads, tokens, site.key_dim, generator=random),
        torch.randn(rows, site.kv_heads, tokens, site.key_dim, generator=random),
        torch.randn(rows, site.kv_heads, tokens, site.value_dim, generator=random),
    )


def prompted(site: Site, device: str = "cpu") -> Cache:
    cache, longest = Cache(CachePlan((site,)), len(LENGTHS), 160, device, scratch=8), max(LENGTHS)
    _, keys, values = (x.to(device) for x in fresh(site, len(LENGTHS), longest, 0))
    valid = torch.arange(longest) < torch.tensor(LENGTHS)[:, None]
    cache.begin(torch.arange(longest).expand(len(LENGTHS), -1).to(device), valid.to(device))
    cache.append(0, keys, values)
    cache.commit([list(range(n)) for n in LENGTHS])
    cache.end_prefill()
    return cache


def check(site: Site, tokens: int, device: str = "cpu", wrong: float = 1.0) -> float:
    """The largest difference from the reference, over options, padding and a tree."""
    cache, kernel = prompted(site, device), TritonAttention(site)
    q, keys, values = (x.to(device) for x in fresh(site, len(LENGTHS), tokens, 1))
    valid = torch.ones(len(LENGTHS), tokens, dtype=torch.bool)
    valid[0, tokens // 2 + 1 :] = False
    for x in (keys, values):
        x[~valid[:, None].expand(x.shape[:3])] = float("nan")
    worst = 0.0
    tree = torch.eye(tokens, dtype=torch.bool)
    tree[:, 0] = True
    for ancestors, softcap, sinks in ((None, None, None), (tree, 5.0, torch.linspace(-2, 3, site.heads))):
        positions = torch.tensor(LENGTHS)[:, None] + (torch.arange(tokens) if ancestors is None else tree.sum(1) - 1)
        cache.begin(positions.to(device), valid.to(device), ancestors if ancestors is None else ancestors.to(device))
        cache.append(0, keys, values)
        out = torch.full((len(LENGTHS), site.heads, tokens, site.value_dim), float("nan"), device=device)
        sinks = sinks if sinks is None else sinks.to(device)
        kernel(cache, 0, q, out, 0.2 * wrong, softcap, sinks)
        worst = max(worst, float((out - cache.attend(0, q, 0.2, site.window, softcap, sinks)).abs().max()))
    return worst


@interpreted
@pytest.mark.parametrize(("name", "tokens"), [*((name, 3) for name in SITES), ("kivi", 1)])
def test_the_kernel_computes_the_reference(name, tokens):
    assert check(SITES[name], tokens) < TOLERANCE[SITES[name].dense]


@interpreted
def test_the_comparison_catches_a_wrong_kernel(monkeypatch):
    site = SITES["kivi"]
    assert check(site, 3, wrong=1.05) > 100 * TOLERANCE["float32"]
    from smelt.codegen import attention_triton

    text = attention_triton.source(site)
    for right, wrong in (
        ("(token < 32)", "(token < 31)"),  # a dropped row of each page
        ("total += share *", "total +="),
        ("b * T + t[:, None]", "b * T + 0 * t[:, None]"),  # every query sees what the first one sees
    ):
        assert right in text
        monkeypatch.setattr(attention_triton, "source", lambda site, r=right, w=wrong: text.replace(r, w))
        assert check(site, 3) > 100 * TOLERANCE["float32"], right


@pytest.mark.skipif(INTERPRETED, reason="is the parent process")
def test_everything_holds_in_the_interpreter():
    """Triton reads the variable when it is imported, so the interpreter has a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout[-4000:]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    ("name", "capability"), [("halves", 80), ("kivi halves", 80), ("kivi halves", 90), ("window", 90)]
)
def test_the_kernel_compiles_for_a_gpu_without_spilling(name, capability, tmp_path, monkeypatch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    site = replace(SITES[name], heads=32, kv_heads=8, key_dim=128, value_dim=128, dense="float16")
    kernel, signatures = TritonAttention(site), signature(site)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    for function, types, constants in (
        (kernel.attend, signatures["attend"], {"SOFTCAP": False, "M": ROWS}),
        (kernel.merge, signatures["merge"], {"sinks": None, "SINKS": False}),
    ):
        compiled = triton.compile(ASTSource(function, types, constants), target=GPUTarget("cuda", capability, 32))
        assert compiled.metadata.shared <= 48 * 1024
        (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
        dump = [tools / "cuobjdump", "--dump-resource-usage", tmp_path / "kernel.cubin"]
        usage = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
        assert re.search(r"REG:\d+ STACK:0 ", usage), usage


@pytest.mark.gpu
@pytest.mark.parametrize("site", SITES.values(), ids=SITES)
@pytest.mark.parametrize("tokens", [1, 3])
def test_the_kernel_computes_the_reference_on_a_gpu(site, tokens):
    assert check(site, tokens, "cuda") < 10 * TOLERANCE[site.dense]


def test_it_covers_what_it_can_print():
    assert all(covers(site) is None for site in SITES.values())
