"""Weights as initialisers: in their encoding where ONNX can say it, `DequantizeLinear` behind integer codes."""

from __future__ import annotations

import math
from typing import Any

import torch

from ...ir.encoding import Affine, Dense
from ...ir.encoding.packing import LANES
from ...ir.errors import SmeltError
from ...ir.program import Program
from ...ir.weight import Weight
from .builder import Builder, onnx_type

SIGNED = {2: "INT2", 4: "INT4", 8: "INT8"}
UNSIGNED = {2: "UINT2", 4: "UINT4", 8: "UINT8"}


def decoded(program: Program, builder: Builder, name: str) -> str:
    """A weight as a value of its own shape: floating types as float32, tables of integers as they are."""
    return _value(program, builder, name, turned=False)


def matrix(builder: Builder, name: str) -> str:
    """A matrix `[N, K]` of the Program as `[K, N]` float32, the right operand of MatMul.

    One that a lookup reads too is stored once: dense in rows, codes in columns.
    """
    program: Program = builder.shared["program"]
    if isinstance(program.weights[name].encoding, Dense) and looked_up(builder, name):
        return str(builder.op("Transpose", decoded(program, builder, name), perm=[1, 0]))
    return _value(program, builder, name, turned=True)


def looked_up(builder: Builder, name: str) -> bool:
    """Whether anything but a matrix product reads the weight."""
    program: Program = builder.shared["program"]
    products = ("smelt.linear.default", "smelt.head.default")
    return any(str(user.target) not in products for user in program.uses(name))


def stored(builder: Builder, name: str, turned: bool, rows: int | None = None) -> tuple[str, str | None, str | None]:
    """Initialisers of a weight: codes (or data), scale and zero; the last two are None for dense weights.

    `turned`: both dims swapped. `rows`: one matrix of a stack `[E, N, K]`.
    """
    program: Program = builder.shared["program"]
    weight = program.weights[name]

    def make() -> tuple[str, str | None, str | None]:
        encoding = weight.encoding
        hint = name if rows is None else f"{name}.{rows}"
        if isinstance(encoding, Dense):
            return _dense(builder, hint, weight, turned, rows), None, None
        if isinstance(encoding, Affine) and encoding.planes == 1:
            return _affine(builder, hint, weight, encoding, turned, rows)
        return _otherwise(builder, hint, weight, turned, rows), None, None

    found: tuple[str, str | None, str | None] = builder.once(("weight", name, turned, rows), make)
    return found


def codes(weight: Weight) -> torch.Tensor:
    """The codes of an affine weight one a byte, uint8 of the weight's shape; symmetric ones are offset by 2^(b-1)."""
    encoding = weight.encoding
    assert isinstance(encoding, Affine)
    packed = weight.parts["codes"]
    if encoding.width == 8:
        return packed
    fields = 8 // encoding.width
    blocks = packed.unflatten(-1, (-1, 1, LANES))
    shifts = encoding.width * torch.arange(fields, dtype=torch.uint8)[:, None]
    unpacked: torch.Tensor = (blocks >> shifts) & (2**encoding.width - 1)
    return unpacked.reshape(weight.shape)


def _value(program: Program, builder: Builder, name: str, turned: bool, rows: int | None = None) -> str:
    """The float32 value of a weight, decoded in the graph."""
    weight = program.weights[name]
    data, scale, zero = stored(builder, name, turned, rows)
    if scale is None:
        dtype = getattr(weight.encoding, "torch_dtype", torch.float32)
        narrow = dtype.is_floating_point and dtype != torch.float32
        return str(builder.op("Cast", data, to=onnx_type(torch.float32))) if narrow else data
    encoding = weight.encoding
    assert isinstance(encoding, Affine)
    shape = weight.shape if rows is None else weight.shape[1:]
    return dequantized(builder, encoding, shape[::-1] if turned else shape, turned, (data, scale, zero))


def dequantized(
    builder: Builder, encoding: Affine, dims: tuple[int, ...], turned: bool, parts: tuple[str, str, str | None]
) -> str:
    """`DequantizeLinear` of codes `dims` and, where the encoding has one, the group's minimum on top.

    Scales become float32 first: a product in float16 would round what the program does not.
    """
    data, scale, zero = parts
    wide = builder.op("Cast", scale, to=onnx_type(torch.float32)) if encoding.scale != "float32" else scale
    along = _axis(encoding, len(dims), turned)
    if not encoding.group and len(dims) == 2:
        row = len(dims) - 1 - along
        value = builder.op("DequantizeLinear", data, wide, axis=row)
    else:
        value = builder.op("DequantizeLinear", data, wide, axis=along, block_size=encoding.group or dims[along])
    if zero is None:
        return str(value)
    low = builder.op("Cast", zero, to=onnx_type(torch.float32)) if encoding.scale != "float32" else zero
    group = encoding.group or dims[along]
    apart = (*dims[:along], dims[along] // group, group, *dims[along + 1 :])
    sums = builder.op(
        "Add",
        builder.op("Reshape", value, builder.const(apart)),
        builder.op("Unsqueeze", low, builder.const([along + 1])),
    )
    return str(builder.op("Reshape", sums, builder.const(dims)))


def _axis(encoding: Affine, rank: int, turned: bool) -> int:
    """The dim along which groups lie."""
    along = rank - 1 if encoding.axis == "token" else rank - 2
    return 2 * rank - 3 - along if turned else along


def _dense(builder: Builder, hint: str, weight: Weight, turned: bool, rows: int | None) -> str:
    dtype = getattr(torch, str(weight.encoding.dtype))  # type: ignore[attr-defined]  # Dense
    shape = weight.shape if rows is None else weight.shape[1:]

    def read() -> bytes:
        data = weight.parts["data"] if rows is None else weight.parts["data"][rows]
        return _bytes(data.t() if turned else data)

    dims = shape[::-1] if turned else shape
    return builder.tensor(hint, onnx_type(dtype), dims, math.prod(shape) * dtype.itemsize, read)


def _affine(
    builder: Builder, hint: str, weight: Weight, encoding: Affine, turned: bool, rows: int | None
) -> tuple[str, str, str | None]:
    from onnx import TensorProto

    shape = weight.shape if rows is None else weight.shape[1:]
    dims = shape[::-1] if turned else shape
    kinds = UNSIGNED if encoding.zero else SIGNED
    count = math.prod(shape) * encoding.width // 8

    def part(value: torch.Tensor) -> torch.Tensor:
        value = value if rows is None else value[rows]
        return value.t() if turned else value

    def read() -> bytes:
        fields = part(codes(weight)).contiguous().flatten()
        if not encoding.zero:
            fields = fields - 2 ** (encoding.width - 1)  # wraps to two's complement
        return _bytes(_packed(fields, encoding.width))

    data = builder.tensor(hint, int(getattr(TensorProto, kinds[encoding.width])), dims, count, read)
    scale = _group_values(builder, hint, weight, encoding, "scale", part)
    zero = _group_values(builder, hint, weight, encoding, "zero", part) if encoding.zero else None
    return data, scale, zero


def _group_values(builder: Builder, hint: str, weight: Weight, encoding: Affine, part: str, turn: Any) -> str:
    """Scales or minima in their stored type; those of whole rows of a matrix as a vector."""
    dtype = getattr(torch, encoding.scale)
    value = turn(weight.parts[part])
    flat = part == "scale" and not encoding.group and value.dim() == 2
    dims = (value.numel(),) if flat else tuple(value.shape)

    def read() -> bytes:
        return _bytes(turn(weight.parts[part]))

    return builder.tensor(f"{hint}.{part}", onnx_type(dtype), dims, value.numel() * dtype.itemsize, read)


def _otherwise(builder: Builder, hint: str, weight: Weight, turned: bool, rows: int | None) -> str:
    """An encoding that ONNX has no operator for: refused, or its decoded values where the caller allows it."""
    if not builder.shared.get("allow_decoded"):
        raise SmeltError(
            f"{builder.name}: weight '{hint}' is stored as {weight.encoding}, which ONNX cannot say; the nearest that "
            "exports is affine(bits=4, group=32), or allow_decoded=True writes float32"
        )
    builder.note(f"weights in {weight.encoding} are written decoded, as float32")
    shape = weight.shape if rows is None else weight.shape[1:]

    def read() -> bytes:
        data = weight.dense() if rows is None else weight.dense()[rows]
        return _bytes(data.t() if turned else data)

    dims = shape[::-1] if turned else shape
    return builder.tensor(hint, onnx_type(torch.float32), dims, 4 * math.prod(shape), read)


def _packed(fields: torch.Tensor, width: int) -> torch.Tensor:
    """Codes, one a byte, as ONNX packs them: neighbours in one byte, the first in the lowest bits."""
    if width == 8:
        return fields
    parts = (fields & (2**width - 1)).unflatten(0, (-1, 8 // width))
    packed: torch.Tensor = parts[:, 0].clone()
    for at in range(1, 8 // width):
        packed |= parts[:, at] << (width * at)
    return packed


def _bytes(value: torch.Tensor) -> bytes:
    return bytes(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
