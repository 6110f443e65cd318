"""Equal runs of chunks (stream-K): the same bits as chunks that are handed out, for any ranks and any rows."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from smelt.codegen.attention import SegmentAttention
from smelt.codegen.team import team
from smelt.ir.cache import Cache, CachePlan, Site
from smelt.ir.encoding import Affine

from .mutants import mutant

SITE = Site(
    layer=0, heads=4, kv_heads=2, key_dim=64, value_dim=64, sink=4, tail=64, page=64,
    keys=Affine(4, 32, "channel", True), values=Affine(4, 32, "token", True), dense="float16",
)  # fmt: skip
STREAM = replace(SITE, schedule="stream_k")
LENGTHS = [0, 1500, 63, 700]


def attend(site: Site, tokens: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """A step of a ragged batch by the kernel, and by the reference."""
    random = torch.Generator().manual_seed(0)
    cache, longest = Cache(CachePlan((site,)), len(LENGTHS), 1600), max(LENGTHS)

    def fresh(new: int) -> list[torch.Tensor]:
        return [torch.randn(len(LENGTHS), heads, new, 64, generator=random) for heads in (4, 2, 2)]

    _, k, v = fresh(longest)
    valid = torch.arange(longest) < torch.tensor(LENGTHS)[:, None]
    cache.begin(torch.arange(longest) * valid, valid)
    cache.append(0, k, v)
    cache.commit([list(range(n)) for n in LENGTHS])
    cache.end_prefill()
    q, k, v = fresh(tokens)
    cache.begin(torch.tensor(LENGTHS)[:, None] + torch.arange(tokens))
    cache.append(0, k, v)
    out = torch.full((len(LENGTHS), 4, tokens, 64), float("nan"))
    call = SegmentAttention(site).bind(cache, 0, q, out, 0.125)
    for _ in range(3):  # what a step leaves behind must not disturb the next
        call()
    return out, cache.attend(0, q, 0.125)


@pytest.mark.parametrize("tokens", [1, 33])
def test_equal_runs_give_the_same_bits(tokens):
    (by_chunks, want), (by_runs, _) = attend(SITE, tokens), attend(STREAM, tokens)
    assert torch.equal(by_chunks, by_runs)
    assert (by_runs - want).abs().max() < 3e-6


def test_any_number_of_ranks_gives_the_same_bits():
    """Three ranks in a process of their own, if the machine has that many; rows of 0 to 3 chunks."""
    if os.environ.get("SMELT_THREADS") == "3":
        assert team().ranks <= 3
        return test_equal_runs_give_the_same_bits(1)
    environment = {**os.environ, "SMELT_THREADS": "3", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::{NAME}"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout[-4000:]


NAME = test_any_number_of_ranks_gives_the_same_bits.__name__


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("(rank.number + 1) / rank.team->size", "(rank.number + 1) / rank.team->size - 1"),  # the last chunk left out
        ("all += own(p);", "all += own(p) > 0;"),  # places for chunks
    ],
)
def test_a_wrong_division_is_found(right, wrong):
    with mutant(right, wrong):
        out, want = attend(STREAM)
    assert not bool(((out - want).abs() < 1e-3).all())
