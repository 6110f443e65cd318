"""Encodings of several parts and with tables as pages of a cache: read by the attention kernel in its tiles."""

from dataclasses import replace

import pytest
import torch

from smelt.codegen.attention import SegmentAttention, covers
from smelt.ir.cache import Cache, CachePlan, Site
from smelt.ir.encoding import (
    Affine,
    ChannelScaled,
    Codebook,
    Encoding,
    LowRank,
    Nonuniform,
    Rotated,
    Sign,
    Sparse,
    Sum,
)
from smelt.ir.errors import SmeltError

from .mutants import mutant

PAGED = Site(layer=0, heads=4, kv_heads=2, key_dim=64, value_dim=64, sink=4, tail=64, page=64)
TOLERANCE = 3e-6  # float32
PAIRS: dict[str, tuple[Encoding, Encoding]] = {
    "three bits": (Affine(3, 64, "channel", True), Affine(3, 64, zero=True)),
    "five bits": (Affine(5, 64, "channel", True), Affine(5, 64, zero=True)),
    "six bits": (Affine(6, 32, "channel"), Affine(6, 32)),
    "gear": (
        Sum((Affine(2, 64, "channel", True), LowRank(4), Sparse(0.03, axis="channel")), "outliers"),
        Sum((Affine(2, 64, zero=True), LowRank(2), Sparse(0.03)), "outliers"),
    ),
    "kvquant": (
        Sum((Nonuniform(3, axis="channel", range="calibrated", clip=0.01), Sparse(0.02, "magnitude"))),
        Sum((Nonuniform(3), Sparse(0.02)), "outliers"),
    ),
    "a book and signs": (Codebook(4, 8), ChannelScaled(Sum((Affine(2, 64), Sign())))),
}


def fresh(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v of new tokens."""
    random = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, heads, tokens, 64, generator=random) for heads in (4, 2, 2))
    return q, k * torch.linspace(0.5, 2, 64), v


def stepped(keys: Encoding, values: Encoding) -> tuple[Site, Cache, torch.Tensor]:
    """A site, its cache with three pages a head, in a step of three tokens, and their queries."""
    site = replace(PAGED, keys=keys, values=values)
    _, k, v = fresh(300, 0)
    fitted = (("keys", keys.fit(k[0, :, :256])), ("values", values.fit(v[0, :, :256])))
    tables = {f"0.{role}.{part}": table for role, found in fitted for part, table in found.items()}
    cache = Cache(CachePlan((site,)).with_tables(tables), 1, 900)
    cache.begin(torch.arange(300)[None])
    cache.append(0, k, v)
    cache.commit([list(range(300))])
    cache.end_prefill()
    q, k, v = fresh(3, 1)
    cache.begin(300 + torch.arange(3)[None])
    cache.append(0, k, v)
    return site, cache, q


def error(site: Site, cache: Cache, q: torch.Tensor) -> float:
    out = torch.full((1, 4, 3, 64), float("nan"))
    SegmentAttention(site).bind(cache, 0, q, out, 0.125)()
    return float((out - cache.attend(0, q, 0.125)).abs().nan_to_num(nan=torch.inf).max())


@pytest.mark.parametrize("name", PAIRS)
def test_the_kernel_computes_the_reference(name: str) -> None:
    site, cache, q = stepped(*PAIRS[name])
    assert covers(site) is None
    assert error(site, cache, q) < TOLERANCE


@pytest.mark.parametrize(("name", "right", "wrong"), [("three bits", 4, 2), ("five bits", 16, 8), ("six bits", 16, 8)])
def test_a_wrong_kernel_is_seen(name: str, right: int, wrong: int) -> None:
    """The high bits of a code count half."""
    site, cache, q = stepped(*PAIRS[name])
    with mutant(f" * {right})", f" * {wrong})"):
        assert error(site, cache, q) > 100 * TOLERANCE


@pytest.mark.parametrize(("bits", "columns"), [(3, 64), (5, 32), (6, 64)])
def test_heads_that_hold_no_whole_words_are_refused(bits: int, columns: int) -> None:
    with pytest.raises(SmeltError, match=f"last dim, 48, must be a multiple of {columns} .{bits}-bit packing"):
        CachePlan((replace(PAGED, key_dim=48, keys=Affine(bits, 64, "channel", True)),))


def test_the_tables_of_another_head_are_seen() -> None:
    site, cache, q = stepped(*PAIRS["kvquant"])
    table, want = cache.segments[0].bodies[0].tables["values"]["a_table"], cache.attend(0, q, 0.125)
    out = torch.full((1, 4, 3, 64), float("nan"))
    table.copy_(table.flip(0))
    SegmentAttention(site).bind(cache, 0, q, out, 0.125)()
    assert (out - want).abs().max() > 100 * TOLERANCE


def test_a_rotation_is_turned_by_the_reader() -> None:
    """Queries are turned instead of keys, and what is read of values once at the end."""
    turned = Rotated(Affine(4, 0, zero=True))
    site, cache, q = stepped(turned, turned)
    want, out = cache.attend(0, q, 0.125), torch.full((1, 4, 3, 64), float("nan"))
    SegmentAttention(site).bind(cache, 0, q, out, 0.125)()
    assert (out - want).abs().max() < TOLERANCE
    plain = replace(site, keys=Affine(4, 0, zero=True), values=Affine(4, 0, zero=True))
    assert covers(site) is None and covers(plain) is None
