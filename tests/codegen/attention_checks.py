"""Caches with something in them, and attention over them by the C++ kernel: what its tests share."""

from __future__ import annotations

import torch

from smelt.codegen.attention import Picks, SegmentAttention
from smelt.ir.cache import Cache, CachePlan, Site

TOLERANCE = 3e-6  # float32; the reference itself rounds at 1e-6 over 700 tokens
_kernels: dict[Site, SegmentAttention] = {}


def kernel(site: Site) -> SegmentAttention:
    return _kernels.setdefault(site, _kernels.get(site) or SegmentAttention(site))


def fresh(site: Site, rows: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v of `tokens` new tokens."""
    random = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, site.heads, tokens, site.key_dim, generator=random),
        torch.randn(rows, site.kv_heads, tokens, site.key_dim, generator=random),
        torch.randn(rows, site.kv_heads, tokens, site.value_dim, generator=random),
    )


def plan(site: Site) -> CachePlan:
    """The plan of one site, with tables of its encodings from random data, other ones for each KV head."""
    tables = {}
    for number, encodings in enumerate(site.encodings if site.tail is not None and site.kept else ()):
        _, keys, values = fresh(site, 1, 512, 99 + number)
        for role, encoding, x in zip(("keys", "values"), encodings, (keys[0], values[0]), strict=True):
            spread = x * torch.linspace(0.8, 1.3, site.kv_heads)[:, None, None]
            lead = f"0.{role}." if not number else f"0.{role}.{number}."
            tables |= {lead + name: table for name, table in encoding.fit(spread).items()}
    return CachePlan((site,)).with_tables(tables) if tables else CachePlan((site,))


def prompted(site: Site, lengths: list[int], capacity: int = 900, seed: int = 0) -> Cache:
    cache, longest = Cache(plan(site), len(lengths), capacity), max(lengths)
    if longest:
        q, keys, values = fresh(site, len(lengths), longest, seed)
        valid = torch.arange(longest) < torch.tensor(lengths)[:, None]
        cache.begin(torch.arange(longest).expand(len(lengths), -1), valid)
        cache.append(0, keys, values)
        if site.watches:
            cache.attend(0, q, site.attention_scale)
        cache.commit([list(range(n)) for n in lengths])
    cache.end_prefill()
    return cache


def after(cache: Cache, tokens: int) -> torch.Tensor:
    return torch.tensor(cache.lengths)[:, None] + torch.arange(tokens)


def chain(parents: list[int]) -> torch.Tensor:
    """ancestors [T, T] of a tree."""
    seen = torch.eye(len(parents), dtype=torch.bool)
    for node in range(1, len(parents)):
        seen[node] |= seen[parents[node]]
    return seen


def attend(
    cache: Cache,
    q: torch.Tensor,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    scale: float = 0.125,
    picks: Picks | None = None,
) -> torch.Tensor:
    site = cache.plan[0]
    out = torch.full((*q.shape[:3], site.value_dim), float("nan"))
    kernel(site).bind(cache, 0, q, out, scale, softcap, sinks, picks)()
    return out
