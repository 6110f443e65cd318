"""Microsoft's contributed ops besides attention: fused norms, activations, products and embeddings."""

from __future__ import annotations

import torch
from torch.nn import functional

from ..registry import MICROSOFT, STANDARD, Tensor, Value, op


@op("SkipLayerNormalization", domain=MICROSOFT)
def skip_layer_normalization(
    x: Tensor,
    skip: Tensor,
    gamma: Tensor,
    beta: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
    outputs: int = 1,
) -> Value:
    total = x + skip if bias is None else x + skip + bias
    normed = functional.layer_norm(total, [total.shape[-1]], gamma, beta, epsilon)
    return _with_sum(normed, total, epsilon, outputs)


@op("SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def skip_simplified_layer_normalization(
    x: Tensor,
    skip: Tensor,
    gamma: Tensor,
    bias: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
    outputs: int = 1,
) -> Value:
    total = x + skip if bias is None else x + skip + bias
    return _with_sum(functional.rms_norm(total, [total.shape[-1]], gamma, epsilon), total, epsilon, outputs)


def _with_sum(normed: Tensor, total: Tensor, epsilon: float, outputs: int) -> Value:
    """Result, mean, inverse deviation and sum, as far as they are asked for; the two in the middle are for training."""
    if outputs == 1:
        return normed
    mean = total.mean(-1, True)
    return normed, mean, torch.rsqrt((total - mean).square().mean(-1, True) + epsilon), total


@op("SimplifiedLayerNormalization", domain=STANDARD)
@op("SimplifiedLayerNormalization", domain=MICROSOFT)
def simplified_layer_normalization(
    x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1, outputs: int = 1
) -> Value:
    if axis not in (-1, x.dim() - 1):
        raise ValueError(f"axis {axis} of {x.dim()} dimensions is not the last")
    out = functional.rms_norm(x, [x.shape[-1]], scale, epsilon)
    return out if outputs == 1 else (out, torch.rsqrt(x.square().mean(-1, True) + epsilon))


@op("Gelu", domain=MICROSOFT)
def gelu(x: Tensor) -> Tensor:
    return functional.gelu(x)


@op("FastGelu", domain=MICROSOFT)
def fast_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.gelu(x if bias is None else x + bias, approximate="tanh")


@op("BiasGelu", domain=MICROSOFT)
def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return functional.gelu(x + bias)


@op("QuickGelu", domain=MICROSOFT)
def quick_gelu(x: Tensor, *, alpha: float = 1.702) -> Tensor:
    return functional.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


@op("FusedMatMul", "TransposeMatMul", domain=MICROSOFT)
def fused_matmul(
    a: Tensor,
    b: Tensor,
    *,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    transBatchA: int = 0,
    transBatchB: int = 0,
) -> Tensor:
    if transBatchA or transBatchB:
        raise ValueError("transposed batches cannot be imported yet")
    out = torch.matmul(a.transpose(-1, -2) if transA else a, b.transpose(-1, -2) if transB else b)
    return out if alpha == 1.0 else out * alpha


@op("BiasAdd", domain=MICROSOFT)
def bias_add(x: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
    return x + bias + skip


@op("EmbedLayerNormalization", domain=MICROSOFT)
def embed_layer_normalization(
    ids: Tensor,
    segments: Tensor | None,
    words: Tensor,
    places: Tensor,
    kinds: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
    mask_index_type: int = 0,
    outputs: int = 1,
) -> Value:
    at = torch.arange(ids.shape[1]).unsqueeze(0) if positions is None else positions
    total = functional.embedding(ids, words) + functional.embedding(at, places)
    if segments is not None and kinds is not None:
        total = total + functional.embedding(segments, kinds)
    out = functional.layer_norm(total, [total.shape[-1]], gamma, beta, epsilon)
    if outputs == 1:
        return out
    count = torch.zeros(ids.shape[0], dtype=torch.int32) if mask is None else mask.sum(1, dtype=torch.int32)
    return out, count, total


@op("Inverse", domain=MICROSOFT)
def inverse(x: Tensor) -> Tensor:
    inverted: Tensor = torch.linalg.inv(x)
    return inverted


def unpacked(packed: Tensor, bits: int) -> Tensor:
    """Codes of `bits` bits, the first in the lowest, one to an element of the last dimension."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    codes: Tensor = ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)
    return codes


def decoded_blocks(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """(q - zero) · scale of codes [N, blocks, block]; without zeros they are in the middle."""
    n, blocks, _ = codes.shape
    middle: Tensor | float = float(2 ** (bits - 1))
    if zeros is not None and zeros.is_floating_point():
        middle = zeros.reshape(n, blocks, 1)
    elif zeros is not None:
        middle = unpacked(zeros.reshape(n, -1), bits)[:, :blocks, None].to(scales.dtype)
    return (codes.to(scales.dtype) - middle) * scales.reshape(n, blocks, 1)


@op("MatMulNBits", domain=MICROSOFT)
def matmul_n_bits(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    order: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    K: int,
    N: int,
    bits: int = 4,
    block_size: int,
    accuracy_level: int = 0,
    weight_prepacked: int = 0,
) -> Tensor:
    if order is not None or weight_prepacked or bits not in (2, 4, 8):
        raise ValueError(f"{bits} bits{', reordered' * (order is not None)}{', prepacked' * bool(weight_prepacked)}")
    codes = unpacked(packed.reshape(N, -1, packed.shape[-1]), bits)
    weight = decoded_blocks(codes, scales, zeros, bits).reshape(N, -1)[:, :K]
    return functional.linear(x, weight, bias)


@op("GatherBlockQuantized", domain=MICROSOFT)
def gather_block_quantized(
    data: Tensor,
    indices: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    gather_axis: int = 0,
    quantize_axis: int = 1,
    block_size: int = 128,
    bits: int = 4,
) -> Tensor:
    if gather_axis or quantize_axis % data.dim() != data.dim() - 1 or data.dim() != 2:
        raise ValueError("only rows of a matrix in blocks along its rows can be imported yet")
    codes = (
        unpacked(data, bits)
        if data.dtype is torch.uint8 and data.shape[1] * 8 // bits == scales.shape[1] * block_size
        else data
    )
    middle = (0 if data.dtype is torch.int8 else 2 ** (bits - 1)) if zeros is None else None
    blocks = codes.reshape(codes.shape[0], -1, block_size)
    if middle is not None:
        table = (blocks.to(scales.dtype) - middle) * scales.unsqueeze(-1)
    else:
        table = decoded_blocks(blocks, scales, zeros, bits)
    return functional.embedding(indices, table.reshape(codes.shape))


@op("Linear", domain="smelt")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What packed products become once their weights have an encoding of ours."""
    return functional.linear(x, weight, bias)
