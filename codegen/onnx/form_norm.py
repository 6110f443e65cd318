"""Normalisation, rotary positions, rounded and turned activations."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import fx

from ...ir.ops.hadamard import walsh
from ...ir.program import Program
from .builder import Builder, Value
from .codes import FLOAT
from .forms import Given, form

INT8 = 3  # TensorProto.INT8


@form("smelt.rms_norm")
def rms_norm(b: Builder, node: fx.Node, a: Given) -> str:
    """RMSNormalization over the last dim; Gemma's offset goes into the weight."""
    return str(b.op("RMSNormalization", a["x"], _plus(b, a["weight"], a["offset"]), axis=-1, epsilon=a["eps"]))


def _plus(b: Builder, weight: Value, offset: float) -> Value | str:
    """weight + offset; one that is stored is added to when the model is written."""
    if not offset:
        return weight
    if weight.weight is None:
        return str(b.op("Add", weight, b.const(offset)))
    program: Program = b.shared["program"]
    value = program.weights[weight.weight].dense() + offset
    return b.array(f"{weight.weight}.plus", value.numpy().astype(np.float32))


@form("smelt.layer_norm")
def layer_norm(b: Builder, node: fx.Node, a: Given) -> str:
    """LayerNormalization over the last dim."""
    return str(b.op("LayerNormalization", a["x"], a["weight"], a["bias"], axis=-1, epsilon=a["eps"]))


@form("smelt.rotary")
def rotary(b: Builder, node: fx.Node, a: Given) -> str:
    """RotaryEmbedding in the split-half layout; cosines and sines are computed once for all layers."""
    cos, sin = angles(b, a["positions"], a["inv_freq"], a["scale"])
    turned = 2 * int(a["inv_freq"].shape[0])
    partial = turned if turned != node.meta["shape"][-1] else None
    return str(b.op("RotaryEmbedding", a["x"], cos, sin, interleaved=0, rotary_embedding_dim=partial))


def angles(b: Builder, positions: Value, inv_freq: Value, scale: float) -> tuple[str, str]:
    """cos and sin [B, T, R] of positions · inv_freq, times `scale`."""
    angle = b.op("Mul", b.op("Unsqueeze", b.op("Cast", positions, to=FLOAT), b.const([2])), inv_freq)
    made = [str(b.op(kind, angle)) for kind in ("Cos", "Sin")]
    if scale != 1.0:
        made = [str(b.op("Mul", value, b.const(float(scale)))) for value in made]
    return made[0], made[1]


@form("smelt.quantized")
def quantized(b: Builder, node: fx.Node, a: Given) -> str:
    """Integers of `bits` bits with a scale a group, and back: QuantizeLinear and DequantizeLinear with blocks."""
    x, levels = a["x"], 2 ** (a["bits"] - 1) - 1
    rank, width = len(x.shape), int(x.shape[-1])
    group = a["group"] or width
    apart = b.op("Reshape", x, b.const([0] * (rank - 1) + [width // group, group]))
    peak = b.op("ReduceMax", b.op("Abs", apart), b.const([rank]), keepdims=0)
    scale = b.op("Div", peak, b.const(float(levels)))
    scale = b.op("Where", b.op("Equal", scale, b.const(0.0)), b.const(1.0), scale)
    # |x| / scale never rounds beyond `levels`, so that int8 holds the codes of every width
    codes = b.op("QuantizeLinear", x, scale, axis=rank - 1, block_size=group, output_dtype=INT8)
    return str(b.op("DequantizeLinear", codes, scale, axis=rank - 1, block_size=group))


@form("smelt.hadamard")
def hadamard(b: Builder, node: fx.Node, a: Given) -> str:
    """Blocks as matrices [2^i, 2^j] between two constant ones: H of 2^(i+j) is that of 2^i (x) that of 2^j."""
    x, size = a["x"], int(a["size"])
    width, lead = int(x.shape[-1]), [0] * (len(x.shape) - 1)
    rows = 1 << (size.bit_length() - 1) // 2
    left, right = (b.array(f"hadamard.{n}", (walsh(torch.eye(n)) / math.sqrt(n)).numpy()) for n in (rows, size // rows))
    blocks = b.op("Reshape", x, b.const([*lead, width // size, rows, size // rows]))
    return str(b.op("Reshape", b.op("MatMul", left, b.op("MatMul", blocks, right)), b.const([*lead, width])))
