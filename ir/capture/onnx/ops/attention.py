"""Attention and rotary embedding of the standard domain, and the parts that Microsoft's ops share with them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..registry import DType, Tensor, Value, op
from .shape import concat

aten = torch.ops.aten
_SEES: ContextVar[bool] = ContextVar("every query sees a key", default=False)


@contextmanager
def every_query_sees() -> Iterator[None]:
    """While a decoder over real tokens is traced: its masks hide the future at most, so no row is without a key."""
    token = _SEES.set(True)
    try:
        yield
    finally:
        _SEES.reset(token)


def heads(x: Tensor, count: int | None) -> Tensor:
    """[B, T, H·D] → [B, H, T, D]; a tensor of rank 4 as it is."""
    if x.dim() == 4:
        return x
    if not count:
        raise ValueError("three dimensions need the number of heads")
    return x.reshape(x.shape[0], x.shape[1], count, x.shape[2] // count).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """[B, H, T, D] → [B, T, H·D]."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], x.shape[1] * x.shape[3])


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Turns the first 2 R dims of x [B, H, T, D] by waves [B, T, R]; written as raising knows it."""
    r = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rest = [aten.slice.Tensor(x, 3, 2 * r, x.shape[3])] if x.shape[3] > 2 * r else []
    if interleaved:
        a, b = aten.slice.Tensor(x, 3, 0, 2 * r, 2), aten.slice.Tensor(x, 3, 1, 2 * r, 2)
        pairs = torch.stack([a * cos - b * sin, b * cos + a * sin], -1)
        return torch.cat([pairs.flatten(-2), *rest], -1) if rest else pairs.flatten(-2)
    a, b = aten.slice.Tensor(x, 3, 0, r), aten.slice.Tensor(x, 3, r, 2 * r)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, *rest], -1)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float | None,
    softcap: float = 0.0,
    causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """The dialect's attention while a graph is traced, and its formula otherwise: one checks the other.

    Causal means that the last query sees the last key. A row without any key gives zeros.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if torch.compiler.is_exporting():
        operands = (query, key, value, _of_rank_four(bias), None, float(scale), causal, window, softcap or None)
        traced: Tensor = torch.ops.smelt.attention(*operands)
        return traced
    if causal:
        bias = _both(bias, _causal(query, key, window))
    return _formula(query, key, value, bias, scale, softcap)[0]


def _of_rank_four(bias: Tensor | None) -> Tensor | None:
    while bias is not None and bias.dim() < 4:
        bias = bias.unsqueeze(0)
    return bias


def _causal(query: Tensor, key: Tensor, window: int | None, offset: Any = None) -> Tensor:
    """bool [T, S], or [B, 1, T, S] with an offset for each sequence: true where a key is seen."""
    t, s = query.shape[2], key.shape[2]
    at = torch.arange(t)[:, None] + (s - t if offset is None else offset)
    seen = torch.arange(s) <= at
    return seen if window is None else seen & (torch.arange(s) > at - window)


def _both(bias: Tensor | None, seen: Tensor) -> Tensor:
    if bias is None:
        return seen
    if bias.dtype is torch.bool:
        return bias & seen
    return torch.where(seen, bias, -math.inf)


def _formula(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Result, and what the product is raw, behind the soft cap, behind the mask and behind the softmax."""
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    root = math.sqrt(scale)
    product = (query * root) @ (key * root).transpose(-1, -2)
    capped = torch.tanh(product / softcap) * softcap if softcap else product
    if bias is None:
        masked = capped
    elif bias.dtype is torch.bool:
        masked = torch.where(bias, capped, torch.full_like(capped, -math.inf))
    else:
        masked = capped + bias
    shares = torch.softmax(masked.float(), -1)
    shares = torch.where((masked == -math.inf).all(-1, True), torch.zeros_like(shares), shares).to(query.dtype)
    return shares @ value, product, capped, masked, shares


@op("Attention", since=23)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: DType | None = None,
    left_window_size: int = -1,
    right_window_size: int = -1,
    outputs: int = 1,
) -> Value:
    flat = q.dim() == 3
    query, key, value = heads(q, q_num_heads), heads(k, kv_num_heads), heads(v, kv_num_heads)
    # where the last query sees the last key, as in the dialect; in the file's words offset + query = key
    aligned = not is_causal or statically_known_true(query.shape[2] == key.shape[2])
    if past_key is not None and past_value is not None:
        key, value = concat(past_key, key, axis=2), concat(past_value, value, axis=2)
    if mask is not None and isinstance(mask.shape[-1], int) and isinstance(key.shape[2], int):
        missing = key.shape[2] - mask.shape[-1]
        hidden: Any = False if mask.dtype is torch.bool else -math.inf
        mask = torch.nn.functional.pad(mask, (0, missing), value=hidden) if missing > 0 else mask
    windowed = left_window_size >= 0 or right_window_size >= 0
    plain = outputs < 4 and lengths is None and not (windowed and not is_causal)
    if torch.compiler.is_exporting() and plain and aligned and right_window_size <= 0:
        window = left_window_size + 1 if left_window_size >= 0 else None
        out = attend(query, key, value, mask, scale, softcap, bool(is_causal), window)
        if mask is not None and not _SEES.get():  # a query that sees no key gets zeros, which the dialect does not say
            seen = mask if mask.dtype is torch.bool else mask != -math.inf
            seen = seen & _causal(query, key, window) if is_causal else seen
            out = torch.where(seen.any(-1, True), out, torch.zeros_like(out))
        return (joined(out) if flat else out), key, value
    offset: Any = 0 if past_key is None else past_key.shape[2]
    if lengths is not None:
        offset = (lengths.reshape(-1) - query.shape[2])[:, None, None, None]
        mask = _both(mask, torch.arange(key.shape[2]) < lengths.reshape(-1, 1, 1, 1))
    if is_causal:
        mask = _both(mask, _causal(query, key, None, offset))
    if windowed:
        apart = torch.arange(query.shape[2])[:, None] + offset - torch.arange(key.shape[2])
        seen = torch.ones_like(apart, dtype=torch.bool)
        seen = seen & (apart <= left_window_size) if left_window_size >= 0 else seen
        mask = _both(mask, seen & (-apart <= right_window_size) if right_window_size >= 0 else seen)
    number = query.shape[-1] ** -0.5 if scale is None else scale
    out, *stages = _formula(query, key, value, mask, number, softcap)
    return (joined(out) if flat else out), key, value, stages[qk_matmul_output_mode]


@op("RotaryEmbedding", since=23)
def rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int | None = None,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    if positions is not None:
        cos, sin = torch.nn.functional.embedding(positions, cos), torch.nn.functional.embedding(positions, sin)
    turned = rotate(heads(x, num_heads), cos, sin, bool(interleaved))
    return turned.transpose(1, 2).reshape(x.shape) if x.dim() == 3 else turned
