"""Reads an ONNX file into a Model: the file is doubted, functions become callable, and no tensor is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
from onnx import defs

from ...errors import SmeltError
from .graph import Function, Graph, Node, Opsets, read_function, read_graph
from .registry import find, refusal

FILE = "model.onnx"


@dataclass(frozen=True)
class Model:
    """A checked ONNX model. `functions` by domain and name."""

    where: str
    folder: Path
    graph: Graph
    opsets: Opsets
    functions: Mapping[tuple[str, str], Function] = field(default_factory=dict)
    producer: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)


def load(path: Path) -> Model:
    """The model of an .onnx file; raises SmeltError naming file, node or tensor."""
    try:
        proto = onnx.load_model(path, load_external_data=False)
    except OSError as fault:
        raise SmeltError(f"{path}: cannot be read ({fault.strerror})") from fault
    except Exception as fault:  # protobuf's DecodeError, in a package without types
        raise SmeltError(f"{path}: not an ONNX model, or truncated ({fault})") from fault
    if not proto.HasField("graph") or not proto.graph.node:
        raise SmeltError(f"{path}: holds no graph; is it an ONNX model?")
    return from_proto(proto, path.parent, str(path))


def from_proto(proto: Any, folder: Path, where: str) -> Model:
    """A ModelProto, with the folder that its external data lies in."""
    opsets = Opsets.of(proto.opset_import, where)
    functions = {}
    for function in proto.functions:
        domain = "" if function.domain in ("", "ai.onnx") else function.domain
        own = Opsets.of(function.opset_import, f"{where}: function {domain}.{function.name}")
        functions[domain, function.name] = read_function(function, own, folder)
    graph = read_graph(proto.graph, opsets, folder)
    facts = {p.key: p.value for p in proto.metadata_props}
    model = Model(where, folder, graph, opsets, functions, proto.producer_name, facts)
    _require_ops(model, graph.nodes, where, ())
    return model


def schema_function(node: Node, opsets: Opsets) -> Function | None:
    """The body that ONNX itself gives an op, where it does not depend on the types of its inputs."""
    try:
        schema: Any = defs.get_schema(node.op, opsets.versions[node.domain], node.domain)
    except (defs.SchemaError, KeyError):
        return None
    if not schema.has_function:
        return None
    body = schema.function_body
    defaults = {name: a.default_value for name, a in schema.attributes.items() if a.default_value.name}
    where = f"{opsets.where}: the body of {node.op}"
    imported = [*body.opset_import] or [onnx.helper.make_opsetid("", schema.since_version)]
    read = read_function(body, Opsets.of(imported, where), Path())
    values = {name: onnx.helper.get_attribute_value(value) for name, value in defaults.items()}
    return Function(read.inputs, read.outputs, read.nodes, {**dict.fromkeys(schema.attributes), **values})


def _require_ops(model: Model, nodes: tuple[Node, ...], where: str, inside: tuple[Any, ...]) -> None:
    """Every op has a function here, in the model or in ONNX's schema; no function calls itself."""
    for node in nodes:
        key = (node.domain, node.op)
        for value in node.attributes.values():
            if isinstance(value, Graph):
                _require_ops(model, value.nodes, where, inside)
        if key in model.functions:
            if key in inside:
                raise SmeltError(f"{where}: the function {node.domain}.{node.op} calls itself")
            _require_ops(model, model.functions[key].nodes, where, (*inside, key))
            continue
        if find(node.domain, node.op, node.version or 1 << 30) is not None:
            continue
        body = schema_function(node, model.opsets) if node.version else None
        if body is None:
            raise SmeltError(f"{where}: {node.label}: {refusal(node.domain, node.op)}")
        if key in inside:
            raise SmeltError(f"{where}: {node.label}: its definition needs itself")
        _require_ops(model, body.nodes, where, (*inside, key))
