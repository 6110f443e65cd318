"""Attention: the plain op that capture emits, and the cached op that reads and writes a cache site."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from .registry import Cost, Shape, define


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """softmax(scale · q kᵀ + mask) v with grouped heads; query head h reads kv head h // (H / G).

    query [B, H, T, D], key [B, G, S, D], value [B, G, S, E] → [B, H, T, E]. `mask` [B, S] is non-zero where a key may
    be seen; one that broadcasts to [B, H, T, S] is boolean (true: seen) or additive. `window`: a query sees the last
    `window` positions, its own included. `softcap` c: logits become c · tanh(logits / c) before masking. `sinks` [H]: a
    learned logit per head that takes part in the softmax and carries no value.
    """
    h, g, t, s = query.shape[1], key.shape[1], query.shape[2], key.shape[2]
    if g != h:
        key, value = key.repeat_interleave(h // g, 1), value.repeat_interleave(h // g, 1)
    logits = (query @ key.transpose(-1, -2)).float() * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if causal:
        distance = torch.arange(s - t, s, device=query.device)[:, None] - torch.arange(s, device=query.device)
        seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        logits = logits.masked_fill(~seen, float("-inf"))
    if mask is not None and mask.dim() == 2:
        mask = mask.bool()[:, None, None, :]
    if mask is not None:
        lowest = torch.finfo(logits.dtype).min
        logits = logits.masked_fill(~mask, lowest) if mask.dtype == torch.bool else logits + mask
    if sinks is not None:
        extra = sinks.float()[None, :, None, None].expand(logits.shape[0], -1, t, 1)
        return (torch.softmax(torch.cat([logits, extra], -1), -1)[..., :-1].to(value.dtype)) @ value
    return torch.softmax(logits, -1).to(value.dtype) @ value


def _attention_shape(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _attention_cost(query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> Cost:
    b, h, t, d = query
    return Cost(flops=2 * sympy.sympify(b) * h * t * key[2] * (d + value[3]))


ATTENTION = define(attention, _attention_shape, _attention_cost)


def cached_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    layer: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Appends key and value to cache site `layer`, then attends over that site; see ir/cache for its meaning.

    Shapes as in `attention`, with S = T new tokens. Without a cache (this reference) the site is empty before the step,
    so that the op is plain causal attention over the new tokens.
    """
    return attention(query, key, value, None, sinks, scale, True, window, softcap)


def _cached_cost(query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> Cost:
    b, h, t, d = query
    context = sympy.Symbol("S", integer=True, positive=True)
    read = sympy.sympify(b) * key[1] * context * (d + value[3])
    return Cost(flops=2 * sympy.sympify(b) * h * t * (context + t) * (d + value[3]), cache_values=read)


CACHED_ATTENTION = define(cached_attention, _attention_shape, _cached_cost)
