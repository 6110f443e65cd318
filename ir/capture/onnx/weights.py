"""Weights that a file holds quantized become weights in an encoding of ours, code for code; the others are decoded.

MatMulNBits, GatherBlockQuantized and DequantizeLinear over stored tensors say (q - zero) · scale in groups. `Affine`
says q · scale with the middle of the codes as zero, or q · scale + zero with a zero of its own per group.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from onnx import TensorProto

from ...encoding import Affine
from ...weight import Weight
from .graph import Graph, Node
from .load import Model
from .ops.contrib import unpacked
from .registry import MICROSOFT
from .stored import PACKED, Stored

_SUFFIX = re.compile(r"(_Q\d+\w*|[._]qweight|_quant\w*|\.quantized|_DQ\w*)$")
_FLOATS = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


@dataclass(frozen=True)
class _Codes:
    """A quantized matrix: codes uint8 [N, K] above 0, scales [N, groups], zeros like scales (None: the middle)."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    bits: int
    group: int  # columns of a group; the last one of a row may have fewer

    def weight(self) -> tuple[Weight, str | None]:
        """In our encoding, or dense with the reason why."""
        n, k = self.codes.shape
        group = min(self.group, k)
        symmetric = self.zero is None or bool((self.zero.float() == 2 ** (self.bits - 1)).all())
        stored = self.scale if symmetric else self.scale.float()
        encoding = Affine(self.bits, 0 if group == k else group, zero=not symmetric, scale=_FLOATS[stored.dtype])
        reason = encoding.refuses((n, k)) if k % group == 0 else "groups do not fill a row"
        if reason is None:
            zero = None if symmetric or self.zero is None else -self.zero.float() * stored
            return Weight((n, k), encoding, encoding.parts(self.codes, stored.contiguous(), zero)), None
        middle: Any = (
            2 ** (self.bits - 1) if self.zero is None else self.zero.float().repeat_interleave(group, 1)[:, :k]
        )
        values = (self.codes.float() - middle) * self.scale.float().repeat_interleave(group, 1)[:, :k]
        return Weight.of(values.to(self.scale.dtype)), reason


@dataclass
class Adopted:
    """A model whose quantized weights stand in `weights`, and what had to be decoded."""

    model: Model
    weights: dict[str, Weight] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def adopt(model: Model) -> Adopted:
    """The model with each quantized product, look-up and decoding of stored tensors over a weight of ours."""
    adopted = Adopted(model)
    tensors, nodes = dict(model.graph.tensors), []
    rules: dict[tuple[str, str], Callable[[_Reader, Node], list[Node] | None]] = {
        (MICROSOFT, "MatMulNBits"): _product,
        (MICROSOFT, "GatherBlockQuantized"): _look_up,
        ("", "DequantizeLinear"): _decoding,
    }
    reader = _Reader(model.graph, tensors, adopted)
    for node in model.graph.nodes:
        rule = rules.get((node.domain, node.op))
        made = None if rule is None else rule(reader, node)
        nodes.extend([node] if made is None else made)
    adopted.model = replace(model, graph=replace(model.graph, nodes=tuple(nodes), tensors=tensors))
    return adopted


class _Reader:
    """The stored inputs of a node, and a place for the weights made of them."""

    def __init__(self, graph: Graph, tensors: dict[str, Stored], adopted: Adopted) -> None:
        self.graph, self.tensors, self.adopted = graph, tensors, adopted
        self.names: dict[str, str] = {}
        self.made_by = {name: node for node in graph.nodes for name in node.outputs if name}
        self.users: dict[str, list[tuple[Node, int]]] = {}
        for node in graph.nodes:
            for i, name in enumerate(node.inputs):
                self.users.setdefault(name, []).append((node, i))

    def given(self, node: Node, index: int) -> Stored | None:
        """An input that the file stores, perhaps in another shape or as narrower floats."""
        if self.is_absent(node, index):
            return None
        name, shape = node.inputs[index], None
        while (made := self.made_by.get(name)) is not None and self._passes(made):
            told = self.tensors.get(made.inputs[1]) if made.op == "Reshape" else None
            if made.op == "Reshape" and told is None:
                return None
            shape = shape if shape is not None or told is None else tuple(int(d) for d in told.array())
            name = made.inputs[0]
        stored = self.tensors.get(name)
        if stored is None or shape is None:
            return stored
        return replace(stored, shape=shape) if min(shape) > 0 and math.prod(shape) == stored.count else None

    def _passes(self, node: Node) -> bool:
        """Whether a node leaves values as they are; a cast does that to stored halves."""
        if node.domain or node.op != "Cast":
            return not node.domain and node.op in ("Reshape", "Identity")
        stored = self.tensors.get(node.inputs[0])
        halves = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
        return node.attributes.get("to") == TensorProto.FLOAT and stored is not None and stored.kind in halves

    def is_absent(self, node: Node, index: int) -> bool:
        """No such input."""
        return index >= len(node.inputs) or not node.inputs[index]

    def add(self, source: str, codes: _Codes) -> str:
        """The name of the weight, under which the graph reads it."""
        name = self.names.get(source)
        if name is None:
            name = _SUFFIX.sub("", source)
            name = name if name != source and name not in self.tensors else f"{source}.decoded"
            self.names[source] = name
            weight, reason = codes.weight()
            self.adopted.weights[name] = weight
            self.tensors[name] = Stored(name, TensorProto.FLOAT, weight.shape, b"")
            if reason is not None:
                self.adopted.notes.append(f"'{source}' is decoded to {weight.encoding}: {reason}")
        return name


def _product(reader: _Reader, node: Node) -> list[Node] | None:
    packed, scales = reader.given(node, 1), reader.given(node, 2)
    told = node.attributes
    bits, block, n, k = int(told.get("bits", 4)), int(told["block_size"]), int(told["N"]), int(told["K"])
    reordered = not reader.is_absent(node, 4) or told.get("weight_prepacked", 0)
    if packed is None or scales is None or bits not in (2, 4, 8) or reordered:
        return None
    zeros = reader.given(node, 3)
    if zeros is None and not reader.is_absent(node, 3):
        return None
    blocks = -(-k // block)
    if packed.nbytes != n * blocks * block * bits // 8 or scales.count != n * blocks:
        return None  # the op itself says what does not fit
    codes = unpacked(packed.read().reshape(n, -1), bits)[:, :k].contiguous()
    zero = None if zeros is None else _zeros(zeros.read(), n, blocks, bits)
    name = reader.add(packed.name, _Codes(codes, scales.read().reshape(n, blocks), zero, bits, block))
    bias = () if reader.is_absent(node, 5) else (node.inputs[5],)
    return [replace(node, domain="smelt", op="Linear", version=0, inputs=(node.inputs[0], name, *bias), attributes={})]


def _zeros(zeros: torch.Tensor, n: int, blocks: int, bits: int) -> torch.Tensor:
    """[N, blocks], packed or plain in the file."""
    if zeros.is_floating_point() or zeros.numel() == n * blocks:
        return zeros.reshape(n, blocks)
    return unpacked(zeros.reshape(n, -1), bits)[:, :blocks]


def _look_up(reader: _Reader, node: Node) -> list[Node] | None:
    data, scales = reader.given(node, 0), reader.given(node, 2)
    told = node.attributes
    bits, block = int(told.get("bits", 4)), int(told.get("block_size", 128))
    if data is None or scales is None or int(told.get("gather_axis", 0)) or len(data.shape) != 2:
        return None
    if int(told.get("quantize_axis", 1)) not in (1, -1):
        return None
    codes, signed = _plain_codes(data, bits if data.kind == TensorProto.UINT8 else 0, scales.shape[1] * block)
    zeros = reader.given(node, 3)
    n, blocks = scales.shape
    if zeros is not None:
        held = zeros.read() if zeros.kind in PACKED else _zeros(zeros.read(), n, blocks, bits)
        zero = held.to(torch.int16) + signed
    else:
        zero = torch.full((n, blocks), signed if signed else 2 ** (bits - 1), dtype=torch.int16)
    width = PACKED[data.kind][0] if data.kind in PACKED else bits
    name = reader.add(data.name, _Codes(codes, scales.read(), zero, width, block))
    version = reader.adopted.model.opsets.version("", "Gather")
    return [
        replace(node, domain="", op="Gather", version=version, inputs=(name, node.inputs[1]), attributes={"axis": 0})
    ]


def _plain_codes(data: Stored, bits: int, width: int) -> tuple[torch.Tensor, int]:
    """Codes from 0 up, and what was added to make them so."""
    held = data.read()
    if bits and bits < 8 and held.shape[1] * 8 // bits == width:
        return unpacked(held, bits), 0
    if held.dtype is torch.int8:
        middle = 2 ** ((PACKED[data.kind][0] if data.kind in PACKED else 8) - 1)
        return (held.to(torch.int16) + middle).to(torch.uint8), middle
    return held, 0


def _decoding(reader: _Reader, node: Node) -> list[Node] | None:
    """DequantizeLinear over a stored matrix: the weight, turned where products read it as [K, N]."""
    data, scales, zeros = reader.given(node, 0), reader.given(node, 1), reader.given(node, 2)
    if data is None or scales is None or (zeros is None and not reader.is_absent(node, 2)):
        return None
    if len(data.shape) != 2 or data.dtype not in (torch.int8, torch.uint8):
        return None
    codes, signed = _plain_codes(data, 0, data.shape[1])
    bits = PACKED[data.kind][0] if data.kind in PACKED else 8
    scale = scales.read()
    scale = scale if scale.dtype in _FLOATS else scale.float()
    zero = torch.zeros(scale.shape, dtype=torch.int16) if zeros is None else zeros.read().to(torch.int16)
    turned = _reads_turned(reader, node.outputs[0])
    scale_of, zero_of = (_spread(t, data.shape, node, turned) for t in (scale, zero + signed))
    if scale_of is None or zero_of is None:
        return None
    if turned:
        codes, scale_of, zero_of = codes.t().contiguous(), scale_of.t(), zero_of.t()
    if scale_of.shape[0] != codes.shape[0] or codes.shape[1] % scale_of.shape[1]:
        return None  # groups along the other axis: left to the op itself
    group = codes.shape[1] // scale_of.shape[1]
    name = reader.add(data.name, _Codes(codes, scale_of.contiguous(), zero_of.contiguous(), bits, group))
    version = reader.adopted.model.opsets.version("", "Transpose" if turned else "Identity")
    if not turned:
        return [replace(node, op="Identity", version=version, inputs=(name,), attributes={})]
    return [replace(node, op="Transpose", version=version, inputs=(name,), attributes={"perm": (1, 0)})]


def _spread(scale: torch.Tensor, shape: tuple[int, ...], node: Node, turned: bool) -> torch.Tensor | None:
    """Scales as a matrix of the data's shape, with one entry for each group along the axis of groups."""
    axis = int(node.attributes.get("axis", 1)) % 2
    if int(node.attributes.get("block_size", 0)):
        return scale
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(1, shape[1]) if turned else scale.reshape(1, 1).expand(shape[0], 1)
    if scale.dim() != 1 or scale.shape[0] != shape[axis]:
        return None
    return scale[:, None] if axis == 0 else scale[None]


def _reads_turned(reader: _Reader, name: str) -> bool:
    """Every reader takes the matrix as the right factor [K, N] of a product."""
    users = reader.users.get(name, [])
    return bool(users) and all(
        (user.op == "MatMul" and i == 1) or (user.op == "Gemm" and i == 1 and not user.attributes.get("transB", 0))
        for user, i in users
    )
