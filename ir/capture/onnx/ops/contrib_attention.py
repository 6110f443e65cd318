"""Microsoft's attention ops: grouped queries with rotary embedding inside, multi-head, and with its own projection."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from ..registry import MICROSOFT, Ints, Tensor, Value, op
from .attention import attend, heads, joined, rotate
from .shape import concat


def _is_empty(past: Tensor | None) -> bool:
    return past is None or (isinstance(past.shape[-2], int) and past.shape[-2] == 0)


@op("GroupQueryAttention", domain=MICROSOFT)
def group_query_attention(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    lengths: Tensor | None = None,
    total: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    positions: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    *,
    num_heads: int,
    kv_num_heads: int,
    scale: float | None = None,
    softcap: float = 0.0,
    local_window_size: int = -1,
    do_rotary: int = 0,
    rotary_interleaved: int = 0,
    smooth_softmax: int = 0,
    qk_output: int = 0,
    k_quant_type: str = "NONE",
    v_quant_type: str = "NONE",
    kv_cache_bit_width: int = 0,
) -> Value:
    if key_scale is not None or value_scale is not None or (k_quant_type, v_quant_type) != ("NONE", "NONE"):
        raise ValueError("a quantized cache belongs to a run, not to the model; export it with a plain one")
    if sinks is not None or smooth_softmax > 0 or qk_output:
        raise ValueError("attention sinks and outputs of the product cannot be imported yet")
    if not _is_empty(past_key):
        raise ValueError("it runs from an empty cache only; recipes make the cache")
    if key is None or value is None:
        size = query.shape[-1] // (num_heads + 2 * kv_num_heads)
        query, key, value = query.split([num_heads * size, kv_num_heads * size, kv_num_heads * size], -1)
    q, k, v = heads(query, num_heads), heads(key, kv_num_heads), heads(value, kv_num_heads)
    if lengths is not None and not torch.compiler.is_exporting() and bool((lengths + 1 != q.shape[2]).any()):
        raise ValueError("its sequences are of different lengths; a capture takes them whole")
    if do_rotary:
        if cos is None or sin is None:
            raise ValueError("do_rotary needs cos_cache and sin_cache")
        at = torch.arange(q.shape[2]).unsqueeze(0) if positions is None else positions
        waves = functional.embedding(at, cos), functional.embedding(at, sin)
        q, k = rotate(q, *waves, bool(rotary_interleaved)), rotate(k, *waves, bool(rotary_interleaved))
    window = local_window_size if local_window_size > 0 else None
    out = attend(q, k, v, bias, scale or None, softcap, True, window)
    return joined(out), k, v


@op("RotaryEmbedding", domain=MICROSOFT)
def rotary_embedding(
    x: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
    scale: float = 1.0,
    is_packed_batching: int = 0,
) -> Tensor:
    if scale != 1.0 or is_packed_batching:
        raise ValueError("a scale, or packed batches, cannot be imported yet")
    count = num_heads or x.shape[-1] // (2 * cos.shape[-1])
    split = heads(x, count)
    at = positions if positions.dim() == 2 else positions.reshape(1, 1) + torch.arange(split.shape[2]).unsqueeze(0)
    turned = rotate(split, functional.embedding(at, cos), functional.embedding(at, sin), bool(interleaved))
    return joined(turned) if x.dim() == 3 else turned


def _masked(mask: Tensor | None, bias: Tensor | None, size: Any) -> Tensor | None:
    """Padding [B, S], or lengths [B], and an additive bias, as one operand of attention."""
    if mask is None:
        return bias
    seen = mask.bool()
    if mask.dim() == 1:
        seen = torch.arange(size) < mask[:, None]
    view = (
        {1: seen[:, None, None, :], 2: seen[:, None, None, :], 3: seen[:, None]}[mask.dim()] if mask.dim() < 4 else seen
    )
    return view if bias is None else torch.where(view, bias, torch.finfo(bias.dtype).min)


@op("MultiHeadAttention", domain=MICROSOFT)
def multi_head_attention(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    past_length: Tensor | None = None,
    indirection: Tensor | None = None,
    *,
    num_heads: int,
    mask_filter_value: float = -10000.0,
    scale: float | None = None,
    unidirectional: int = 0,
) -> Value:
    if past_length is not None or indirection is not None or key is None or value is None:
        raise ValueError("packed inputs and beams cannot be imported yet")
    if bias is not None:
        wide = [
            query.shape[-1],
            query.shape[-1],
            value.shape[-1] if value.dim() == 3 else bias.shape[0] - 2 * query.shape[-1],
        ]
        parts = bias.split(wide)
        query = query + parts[0]
        key, value = (key + parts[1], value + parts[2]) if key.dim() == 3 else (key, value)
    q, k, v = heads(query, num_heads), heads(key, num_heads), heads(value, num_heads)
    if past_key is not None and past_value is not None:
        k, v = concat(past_key, k, axis=2), concat(past_value, v, axis=2)
    out = attend(q, k, v, _masked(mask, attention_bias, k.shape[2]), scale or None, 0.0, bool(unidirectional))
    return joined(out), k, v


@op("Attention", domain=MICROSOFT)
def attention(
    x: Tensor,
    weights: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    past: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_length: Tensor | None = None,
    *,
    num_heads: int,
    do_rotary: int = 0,
    mask_filter_value: float = -10000.0,
    past_present_share_buffer: int = 0,
    qkv_hidden_sizes: Ints | None = None,
    rotary_embedding_dim: int = 0,
    scale: float | None = None,
    unidirectional: int = 0,
) -> Value:
    if do_rotary or past_present_share_buffer or past_length is not None:
        raise ValueError("rotary embedding and shared buffers inside cannot be imported yet")
    third = weights.shape[1] // 3
    product = torch.matmul(x, weights)
    product = product if bias is None else product + bias
    q, k, v = (heads(p, num_heads) for p in product.split(list(qkv_hidden_sizes or (third, third, third)), -1))
    if past is not None:
        k, v = concat(past[0], k, axis=2), concat(past[1], v, axis=2)
    out = attend(q, k, v, _masked(mask, attention_bias, k.shape[2]), scale or None, 0.0, bool(unidirectional))
    return joined(out), torch.stack([k, v])
