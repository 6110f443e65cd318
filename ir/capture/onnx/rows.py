"""Lookups in tables of codes, as smelt exports them: rows are decoded behind the lookup, here the table is encoded."""

from __future__ import annotations

from dataclasses import replace

import torch
from onnx import TensorProto

from ...encoding import Affine
from ...weight import Weight
from .graph import Node, Port
from .load import Model
from .module import OnnxModule
from .stored import Stored
from .weights import Adopted

_SCALES: dict[int, str] = {
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.FLOAT: "float32",
}
_DECODING = ("Cast", "Unsqueeze", "Mul", "Add", "Reshape")
_LOOKED = 64  # rows that are compared


def with_rows(adopted: Adopted) -> Adopted:
    """The model with one Gather for each lookup of codes whose rows are those of an encoding of ours."""
    model = adopted.model
    for node in model.graph.nodes:
        if (node.domain, node.op) == ("", "Gather") and node.inputs[0].endswith(".codes"):
            adopted = _found(adopted, node) or adopted
    return adopted


def _found(adopted: Adopted, codes: Node) -> Adopted | None:
    """With the table of this lookup, or None if it is another computation."""
    model = adopted.model
    name = codes.inputs[0].removesuffix(".codes")
    tables = {part: model.graph.tensors.get(f"{name}.{part}") for part in ("codes", "scale", "zero")}
    parts = {part: stored for part, stored in tables.items() if stored is not None}
    last = _last(model, f"{name}.scale", codes.inputs[1])
    weight = _weight(model, parts, last) if last is not None and {"codes", "scale"} <= parts.keys() else None
    if last is None or weight is None or name in model.graph.tensors or not _same(model, codes, last, weight):
        return None
    gather = replace(codes, inputs=(name, codes.inputs[1]), outputs=last.outputs)
    nodes = tuple(gather if node is last else node for node in model.graph.nodes)
    tensors = {**model.graph.tensors, name: Stored(name, TensorProto.FLOAT, weight.shape, b"")}
    graph = replace(model.graph, nodes=nodes, tensors=tensors)
    return Adopted(replace(model, graph=graph), {**adopted.weights, name: weight}, adopted.notes)


def _last(model: Model, scale: str, ids: str) -> Node | None:
    """The Reshape behind rows · scales (+ zeros)."""
    node = next((n for n in model.graph.nodes if n.op == "Gather" and n.inputs[:2] == (scale, ids)), None)
    for _ in _DECODING:
        if node is None:
            return None
        users = [user for user in model.graph.nodes if node.outputs[0] in user.inputs]
        node = users[0] if len(users) == 1 and users[0].op in _DECODING else None
        if node is not None and node.op == "Reshape":
            return node
    return None


def _weight(model: Model, parts: dict[str, Stored], last: Node) -> Weight | None:
    sizes = model.graph.tensors.get(last.inputs[1])
    codes, scale = parts["codes"], parts["scale"]
    plain = codes.kind == TensorProto.UINT8 and scale.kind in _SCALES
    if sizes is None or not plain or any(len(stored.shape) != 2 for stored in parts.values()):
        return None
    (rows, width), columns, groups = codes.shape, int(sizes.array().reshape(-1)[-1]), scale.shape[1]
    if columns <= 0 or groups <= 0 or columns % groups or width * 8 % columns or width * 8 // columns not in (2, 4, 8):
        return None
    group = 0 if groups == 1 else columns // groups
    encoding = Affine(width * 8 // columns, group, zero="zero" in parts, scale=_SCALES[scale.kind])
    if encoding.refuses((rows, columns)) is not None or any(stored.shape[0] != rows for stored in parts.values()):
        return None
    return Weight((rows, columns), encoding, {part: stored.read() for part, stored in parts.items()})


def _same(model: Model, codes: Node, last: Node, weight: Weight) -> bool:
    """Whether the file's nodes give the rows that the weight has."""
    ids = torch.arange(min(_LOOKED, weight.shape[0]))[None]
    part = _between(model, codes.inputs[1], last)
    try:
        (found,) = OnnxModule(part)(ids)
    except Exception:  # it is computed from more than ids
        return False
    rows = Weight((ids.shape[1], weight.shape[1]), weight.encoding, _first(weight, ids.shape[1])).dense()
    return found.shape == (1, *rows.shape) and bool(torch.allclose(found[0], rows.float(), rtol=1e-6, atol=0))


def _first(weight: Weight, count: int) -> dict[str, torch.Tensor]:
    return {name: part[:count] for name, part in weight.parts.items()}


def _between(model: Model, start: str, last: Node) -> Model:
    """The part of the graph from one value to what a node gives."""
    needed, nodes = set(last.outputs), list[Node]()
    for node in reversed(model.graph.nodes):
        if needed.intersection(node.outputs) and start not in node.outputs:
            needed.update(node.inputs)
            nodes.append(node)
    inputs = (Port(start, TensorProto.INT64, None),)
    tensors = {name: stored for name, stored in model.graph.tensors.items() if name in needed}
    outputs = (Port(last.outputs[0], TensorProto.FLOAT, None),)
    graph = replace(model.graph, inputs=inputs, outputs=outputs, nodes=tuple(nodes[::-1]), tensors=tensors)
    return replace(model, graph=graph)
