"""Writes a step's keys and values behind the tail of a cache layer, in the type that the tail is stored in."""

from __future__ import annotations

import torch

from ..ir.cache import Cache
from .rows import function
from .unit import Call, call

_TAIL, _SLOTS = 9, 10  # words that a moved buffer changes


def append(cache: Cache, layer: int, key: torch.Tensor, value: torch.Tensor, query: torch.Tensor) -> list[Call]:
    """Calls that write key [B, G, T, D] and value [B, G, T, E], of any strides whose last is 1.

    query [B, H, T, D] is written too where the scores of the site need it.
    """
    made = [_append(cache, layer, "tail_k", key), _append(cache, layer, "tail_v", value)]
    return [*made, _append(cache, layer, "tail_q", query)] if cache.plan[layer].watches else made


def _append(cache: Cache, layer: int, role: str, x: torch.Tensor) -> Call:
    batch, heads, tokens, dim = x.shape
    written = function(f"append_{cache.plan[layer].dense}")
    sizes = (*x.stride()[:3], batch, heads, tokens, dim)
    made = call(written, x, *sizes, 0, 0, cache.counts(layer), writes=[], work=2 * x.numel())
    made.writes |= {("cache", layer)}
    generation = -1

    def refresh() -> None:
        nonlocal generation
        if cache.generation == generation:
            return
        segments = cache.segments[layer]
        made.words[_TAIL], made.words[_SLOTS] = getattr(segments, role).data_ptr(), segments.width
        made.words[_SLOTS + 1] = cache.counts(layer).data_ptr()
        generation = cache.generation

    made.refresh, made.steady = refresh, True
    return made
