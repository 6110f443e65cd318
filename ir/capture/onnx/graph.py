"""The graph of an ONNX file as plain data: nodes in a checked order, attributes as Python values, tensors not read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx
from onnx import AttributeProto, defs

from ...errors import SmeltError, nearest
from .stored import Stored, stored

STANDARD_NAMES = ("", "ai.onnx")
OLDEST = 1  # whether an op is read in the meaning that it had then is decided op by op


@dataclass(frozen=True)
class Reference:
    """An attribute whose value a function's caller gives."""

    name: str


@dataclass(frozen=True)
class Node:
    """One call. `version` is the one that last changed the op's meaning, 0 for ops that ONNX has no schema of."""

    name: str
    domain: str
    op: str
    version: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    scope: str = ""  # dotted path of the module that it was exported from, if the file says

    @property
    def label(self) -> str:
        """How errors name it."""
        shown = f"'{self.name}' " if self.name else ""
        return f"node {shown}({f'{self.domain}.' * bool(self.domain)}{self.op} → {next(iter(self.outputs), '')})"


@dataclass(frozen=True)
class Port:
    """An input or output: its element type (0: not a tensor) and dimensions; strings are symbols, None is unknown."""

    name: str
    kind: int
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True)
class Graph:
    """Nodes, each behind the ones that it reads."""

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    nodes: tuple[Node, ...]
    tensors: Mapping[str, Stored] = field(default_factory=dict)


@dataclass(frozen=True)
class Function:
    """A function of the model or of ONNX's own schema: called like an op, defined by nodes."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    attributes: Mapping[str, Any]  # defaults; those without one are None


@dataclass(frozen=True)
class Opsets:
    """The op set versions that a model or function imports."""

    versions: Mapping[str, int]
    where: str

    @classmethod
    def of(cls, imports: Iterable[Any], where: str) -> Opsets:
        """Raises SmeltError for a version of the standard ops that is older or newer than what is read."""
        versions = {("" if o.domain in STANDARD_NAMES else o.domain): int(o.version) for o in imports}
        newest = defs.onnx_opset_version()
        standard = versions.get("", newest)
        if standard < OLDEST:
            raise SmeltError(
                f"{where}: opset {standard} is older than {OLDEST}, the oldest that smelt reads; "
                f"convert it with onnx.version_converter.convert_version(model, {OLDEST + 5})"
            )
        if standard > newest:
            raise SmeltError(
                f"{where}: opset {standard} is newer than onnx {onnx.__version__} knows ({newest}); upgrade onnx"
            )
        return cls(versions, where)

    def version(self, domain: str, op: str) -> int:
        """The version that last changed this op at or before the imported one; 0 where there is no schema."""
        imported = self.versions.get(domain)
        if imported is None:
            raise SmeltError(f"{self.where}: uses {domain or 'standard'} ops, but imports no opset of that domain")
        try:
            return int(defs.get_schema(op, imported, domain).since_version)
        except defs.SchemaError:
            return 0


def read_graph(proto: Any, opsets: Opsets, folder: Path, outer: frozenset[str] = frozenset()) -> Graph:
    """A checked GraphProto; `outer` are the names that an enclosing graph defines before it."""
    where = opsets.where
    tensors = {t.name: stored(t, folder, where) for t in proto.initializer}
    if len(tensors) != len(proto.initializer):
        _refuse_twice([t.name for t in proto.initializer], where, "initialisers")
    if proto.sparse_initializer:
        raise SmeltError(f"{where}: sparse initialisers cannot be imported yet; store the tensors densely")
    inputs = tuple(_port(i, where) for i in proto.input if i.name not in tensors)
    _refuse_twice([i.name for i in proto.input], where, "inputs")
    before = outer | tensors.keys() | {i.name for i in inputs}
    constants, others = _split_constants(proto.node)
    for name, tensor in constants.items():
        if name in before:
            raise SmeltError(f"{where}: a Constant node computes '{name}', a name that is taken already")
        tensors[name] = replace(stored(tensor, folder, where), name=name)
    nodes = read_nodes(others, opsets, folder, before | constants.keys(), where)
    defined = outer | tensors.keys() | {i.name for i in inputs} | {o for n in nodes for o in n.outputs}
    for output in proto.output:
        if output.name not in defined:
            raise SmeltError(f"{where}: nothing computes the output '{output.name}'{nearest(output.name, defined)}")
    if not proto.output:
        raise SmeltError(f"{where}: the graph has no outputs")
    return Graph(proto.name, inputs, tuple(_port(o, where) for o in proto.output), nodes, tensors)


def _split_constants(protos: Any) -> tuple[dict[str, Any], list[Any]]:
    """Tensors of Constant nodes by their output, and all other nodes."""
    constants, others = dict[str, Any](), []
    for proto in protos:
        value = next((a for a in proto.attribute if a.name == "value" and not a.ref_attr_name), None)
        if proto.op_type == "Constant" and value is not None and proto.domain in STANDARD_NAMES:
            constants[proto.output[0]] = value.t
        else:
            others.append(proto)
    return constants, others


def read_nodes(
    protos: Any, opsets: Opsets, folder: Path, before: frozenset[str] | set[str], where: str
) -> tuple[Node, ...]:
    """Nodes whose inputs are all defined before them; raises SmeltError naming the first that reads something else."""
    nodes: list[Node] = []
    defined = set(before)
    later = {name for proto in protos for name in proto.output}
    for proto in protos:
        node = _node(proto, opsets, folder, frozenset(defined))
        for name in node.inputs:
            if not name or name in defined:
                continue
            if name in later:
                raise SmeltError(
                    f"{where}: {node.label} reads '{name}', which is computed behind it: a cycle or a wrong order"
                )
            raise SmeltError(
                f"{where}: {node.label} reads '{name}', which is neither an input, an initialiser nor computed"
                f"{nearest(name, defined)}"
            )
        for name in filter(None, node.outputs):
            if name in defined:
                raise SmeltError(f"{where}: {node.label} computes '{name}', a name that is taken already")
            defined.add(name)
        nodes.append(node)
    return tuple(nodes)


def _node(proto: Any, opsets: Opsets, folder: Path, defined: frozenset[str]) -> Node:
    domain = "" if proto.domain in STANDARD_NAMES else proto.domain
    bare = Node(proto.name, domain, proto.op_type, 0, tuple(proto.input), tuple(proto.output), {})
    where = f"{opsets.where}: {bare.label}"
    told = {p.key: p.value for p in proto.metadata_props}
    attributes = {a.name: _attribute(a, where, opsets, folder, defined) for a in proto.attribute}
    return Node(
        proto.name,
        domain,
        proto.op_type,
        opsets.version(domain, proto.op_type),
        tuple(proto.input),
        tuple(proto.output),
        attributes,
        _scope(told.get("pkg.torch.onnx.name_scopes", ""), proto.name),
    )


def _scope(told: str, name: str) -> str:
    """`model.layers.0.mlp` from the exporter's list of scopes, or from a name such as /model/layers.0/mlp/MatMul."""
    if told.startswith("["):
        names = [part.strip().strip("'\"") for part in told.strip("[]").split(",")]
        return names[-2] if len(names) > 1 else ""
    return ".".join(name.strip("/").split("/")[:-1]) if name.startswith("/") else ""


def _attribute(proto: Any, where: str, opsets: Opsets, folder: Path, defined: frozenset[str]) -> Any:
    if proto.ref_attr_name:
        return Reference(proto.ref_attr_name)
    kind = proto.type
    if kind == AttributeProto.TENSOR:
        return stored(proto.t, folder, where)
    if kind == AttributeProto.GRAPH:
        return read_graph(proto.g, opsets, folder, defined)
    if kind in (AttributeProto.FLOAT, AttributeProto.INT):
        return proto.f if kind == AttributeProto.FLOAT else proto.i
    if kind == AttributeProto.STRING:
        return proto.s.decode("utf-8", "replace")
    if kind in (AttributeProto.FLOATS, AttributeProto.INTS):
        return tuple(proto.floats if kind == AttributeProto.FLOATS else proto.ints)
    if kind == AttributeProto.STRINGS:
        return tuple(s.decode("utf-8", "replace") for s in proto.strings)
    if kind == AttributeProto.TYPE_PROTO:
        return proto.tp
    raise SmeltError(f"{where}: its attribute '{proto.name}' is of a kind that cannot be imported yet")


def _port(proto: Any, where: str) -> Port:
    if not proto.type.HasField("tensor_type"):
        return Port(proto.name, 0, None)
    tensor = proto.type.tensor_type
    if not tensor.HasField("shape"):
        return Port(proto.name, tensor.elem_type, None)
    sizes: list[int | str | None] = []
    for d in tensor.shape.dim:
        if d.HasField("dim_value") and d.dim_value < 0:
            raise SmeltError(f"{where}: '{proto.name}' has the size {d.dim_value} in its shape")
        sizes.append(int(d.dim_value) if d.HasField("dim_value") else d.dim_param or None)
    return Port(proto.name, tensor.elem_type, tuple(sizes))


def _refuse_twice(names: list[str], where: str, what: str) -> None:
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise SmeltError(f"{where}: two {what} are called '{twice}'")


def read_function(proto: Any, opsets: Opsets, folder: Path) -> Function:
    """A FunctionProto of a model or of an op's schema."""
    nodes = read_nodes(proto.node, opsets, folder, set(proto.input), opsets.where)
    attributes: dict[str, Any] = dict.fromkeys(proto.attribute)
    for a in proto.attribute_proto:
        attributes[a.name] = _attribute(a, opsets.where, opsets, folder, frozenset())
    return Function(tuple(proto.input), tuple(proto.output), nodes, attributes)
