"""Affine codes inside the graph, in the bytes of the Program's own layout: unpacked, decoded, encoded and packed.

The layout is that of `ir/encoding/affine.py`: byte j of a block of 16 · 8 / bits columns holds columns j, j + 16, ….
`lead` is always the number of dims before the last (`[..., K]`) or the last two (`[..., N, K]`); their sizes are copied
and may be 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from ...ir.encoding import Affine
from ...ir.encoding.packing import LANES
from .builder import Builder, Operand

FLOAT, BYTE, HALF, BRAIN = 1, 2, 10, 16  # TensorProto.FLOAT, UINT8, FLOAT16, BFLOAT16
STORED = {"float32": FLOAT, "float16": HALF, "bfloat16": BRAIN}


def decoded_rows(b: Builder, encoding: Affine, parts: Mapping[str, Operand], lead: int, columns: int) -> str:
    """Float32 `[..., K]` from parts `[..., bytes]` and `[..., groups]` of an encoding with groups along K."""
    values = _unpacked(b, encoding, parts["codes"], lead, columns)
    group = encoding.group or columns
    grouped = b.op("Reshape", values, b.const([0] * lead + [columns // group, group]))
    return _scaled(b, encoding, grouped, parts, -1, [0] * lead + [columns])


def decoded_pages(
    b: Builder, encoding: Affine, parts: Mapping[str, Operand], lead: int, rows: int, columns: int
) -> str:
    """Float32 `[..., N, K]` from the parts of such matrices."""
    if encoding.axis == "token":
        return decoded_rows(b, encoding, parts, lead + 1, columns)
    values = _unpacked(b, encoding, parts["codes"], lead + 1, columns)
    grouped = b.op("Reshape", values, b.const([0] * lead + [rows // encoding.group, encoding.group, columns]))
    return _scaled(b, encoding, grouped, parts, -2, [0] * lead + [rows, columns])


def encoded_pages(b: Builder, encoding: Affine, x: Operand, lead: int, rows: int, columns: int) -> dict[str, str]:
    """The parts of float32 matrices `[..., N, K]`: step for step what `Affine.encode` does."""
    if encoding.axis == "token":
        group = encoding.group or columns
        apart, dim = [0] * lead + [rows, columns // group, group], -1
    else:
        apart, dim = [0] * lead + [rows // encoding.group, encoding.group, columns], -2
    groups = b.op("Reshape", x, b.const(apart))
    axis = b.const([dim % len(apart)])
    low = b.op("ReduceMin", groups, axis, keepdims=1)
    high = b.op("ReduceMax", groups, axis, keepdims=1)
    parts: dict[str, str] = {}
    if encoding.zero:
        levels = 2**encoding.width - 1
        zero = _rounded(b, encoding, low)
        parts["zero"] = b.op("Squeeze", _stored(b, encoding, zero), axis)
        span = b.op("Max", b.op("Sub", high, zero), b.const(0.0))
        shifted = b.op("Sub", groups, zero)
    else:
        levels = 2 ** (encoding.width - 1) - 1
        span = b.op("Max", high, b.op("Neg", low))
        shifted = groups
    scale = _step(b, encoding, span, levels)
    parts["scale"] = b.op("Squeeze", _stored(b, encoding, scale), axis)
    divisor = b.op("Where", b.op("Equal", scale, b.const(0.0)), b.const(1.0), scale)
    rounded = b.op("Round", b.op("Div", shifted, divisor))
    lowest = 0.0 if encoding.zero else -float(levels)
    clipped = b.op("Clip", rounded, b.const(lowest), b.const(float(levels)))
    if not encoding.zero:
        clipped = b.op("Add", clipped, b.const(float(2 ** (encoding.width - 1))))
    codes = b.op("Reshape", b.op("Cast", clipped, to=BYTE), b.const([0] * lead + [rows, columns]))
    parts["codes"] = _packed(b, encoding, codes, lead + 1, columns)
    return parts


def _unpacked(b: Builder, encoding: Affine, codes: Operand, lead: int, columns: int) -> str:
    """Codes as float32 `[..., K]`, without the offset of symmetric ones."""
    values = codes
    if encoding.width < 8:
        blocks = b.op("Reshape", codes, b.const([0] * lead + [columns // encoding.block, 1, LANES]))
        mask = b.const(np.array(2**encoding.width - 1, np.uint8))
        fields = []
        for at in range(8 // encoding.width):
            shift = b.const(np.array(encoding.width * at, np.uint8))
            moved = b.op("BitShift", blocks, shift, direction="RIGHT") if at else blocks
            fields.append(b.op("BitwiseAnd", moved, mask))
        values = b.op("Reshape", b.op("Concat", *fields, axis=lead + 1), b.const([0] * lead + [columns]))
    wide = b.op("Cast", values, to=FLOAT)
    return str(wide if encoding.zero else b.op("Sub", wide, b.const(float(2 ** (encoding.width - 1)))))


def _packed(b: Builder, encoding: Affine, codes: Operand, lead: int, columns: int) -> str:
    """Codes one a byte `[..., K]` as stored."""
    if encoding.width == 8:
        return str(codes)
    count = 8 // encoding.width
    fields = b.op("Reshape", codes, b.const([0] * lead + [columns // encoding.block, count, LANES]))
    split = b.op("Split", fields, axis=lead + 1, num_outputs=count, outputs=count)
    packed = split[0]
    for at in range(1, count):
        shift = b.const(np.array(encoding.width * at, np.uint8))
        packed = b.op("BitwiseOr", packed, b.op("BitShift", split[at], shift, direction="LEFT"))
    return str(b.op("Reshape", packed, b.const([0] * lead + [columns // count])))


def _scaled(
    b: Builder, encoding: Affine, groups: Operand, parts: Mapping[str, Operand], dim: int, dims: list[int]
) -> str:
    """codes · scale (+ zero) with a scale for each group, in the shape `dims`."""
    for kind, part in (("Mul", "scale"), ("Add", "zero")):
        if part in parts:
            wide = parts[part] if encoding.scale == "float32" else b.op("Cast", parts[part], to=FLOAT)
            groups = b.op(kind, groups, b.op("Unsqueeze", wide, b.const([dim])))
    return str(b.op("Reshape", groups, b.const(dims)))


def _rounded(b: Builder, encoding: Affine, value: Operand) -> str:
    """Float32 values that the type of scales can hold."""
    if encoding.scale == "float32":
        return str(value)
    return str(b.op("Cast", b.op("Cast", value, to=STORED[encoding.scale]), to=FLOAT))


def _stored(b: Builder, encoding: Affine, value: Operand) -> str:
    return str(value if encoding.scale == "float32" else b.op("Cast", value, to=STORED[encoding.scale]))


def _step(b: Builder, encoding: Affine, span: Operand, levels: int) -> str:
    """span / levels as stored; among subnormals the next one up where rounding would clip."""
    scale = _rounded(b, encoding, b.op("Div", span, b.const(float(levels))))
    info = torch.finfo(getattr(torch, encoding.scale))
    short = b.op("Less", b.op("Mul", scale, b.const(float(levels))), span)
    tiny = b.op("Less", scale, b.const(info.smallest_normal))
    up = b.op("Add", scale, b.const(info.smallest_normal * info.eps))
    return str(b.op("Where", b.op("And", short, tiny), up, scale))
