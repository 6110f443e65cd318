"""An ONNX model as a torch module: its nodes run one by one, eagerly or while torch.export watches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...errors import SmeltError
from ...weight import Weight
from ..exported import first_line
from . import ops as _ops  # noqa: F401  # registers them
from .graph import Function, Graph, Node, Reference
from .kinds import NARROW, carry, marked
from .known import MOST, Known, as_tensor, cast, compute, has_numpy_type, numpy_type
from .load import Model, schema_function
from .registry import INTS, NUMBER, OPERAND, TENSOR, Body, DType, Kind, Rule, Value, find, refusal, refuse_attributes
from .room import require_room
from .stored import Stored, dtype_of

Scope = dict[str, Any]  # values by name: tensors, Known, lists (sequences), None (an optional that is empty)


class OnnxModule(nn.Module):
    """Runs `model` on positional inputs and returns a tuple of its outputs.

    Stored tensors are read where they are used and dropped after. `exact` keeps every type as the file has it; without
    it floating types of any width are float32, as in a Program. `weights` replaces stored tensors by name, and `held`
    gives tensors in their place (a trace's placeholders).
    """

    def __init__(self, model: Model, exact: bool = False, weights: Mapping[str, Weight] | None = None) -> None:
        super().__init__()
        self.model, self.exact = model, exact
        self.weights = dict(weights or {})
        self.held: dict[str, torch.Tensor] = {}
        self.doubting = False  # asks before each op whether its result fits into memory
        self.watch: Callable[[str, Any], None] | None = None  # is told every value of the main graph
        self.replaced: dict[str, Any] = {}  # values by name that stand for what the graph computes
        self.added: dict[str, Any] = {}  # values by name that nodes read beside the file's inputs
        self._bodies: dict[tuple[str, str], Function | None] = {}

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        """Positional, in the order of the file's inputs."""
        graph = self.model.graph
        scope: Scope = {**dict(zip((port.name for port in graph.inputs), inputs, strict=True)), **self.added}
        for port in graph.inputs:
            if isinstance(scope[port.name], torch.Tensor):
                marked(scope[port.name], port.kind)
        found = self.run(graph, scope)
        return tuple(as_tensor(value) if isinstance(value, Known) else value for value in found)

    def run(self, graph: Graph, scope: Scope) -> tuple[Any, ...]:
        """The outputs of a graph whose inputs, and the names of enclosing graphs, are in `scope`."""
        for name, stored in graph.tensors.items():
            scope[name] = self._constant(stored)
        self._run(graph.nodes, scope, {port.name for port in graph.outputs}, {})
        return tuple(self._value(scope[port.name]) for port in graph.outputs)

    def _run(self, nodes: tuple[Node, ...], scope: Scope, kept: set[str], given: Mapping[str, Any]) -> None:
        last = {name: node for node in nodes for name in reads(node)}
        dying: dict[int, list[str]] = {}
        for name, node in last.items():
            dying.setdefault(id(node), []).append(name)
        for node in nodes:
            values = self._call(node, scope, given)
            for name, value in zip(node.outputs, values, strict=False):
                if name:
                    scope[name] = self.replaced.get(name, value)
                    if self.watch is not None:
                        self.watch(name, value)
            for name in dying.get(id(node), ()):
                if name not in kept:
                    scope.pop(name, None)

    def _call(self, node: Node, scope: Scope, given: Mapping[str, Any]) -> tuple[Any, ...]:
        where = f"{self.model.where}: {node.label}"
        inputs = [self._value(scope[name]) if name else None for name in node.inputs]
        while inputs and inputs[-1] is None and not node.inputs[len(inputs) - 1]:
            inputs.pop()  # a trailing empty name is an input that is not given
        attributes = self._attributes(node, given)
        try:
            values = self._result(node, inputs, attributes, scope, where)
        except SmeltError:
            raise
        except Exception as fault:  # torch raises every kind for inputs that do not fit
            if "data-dependent" in str(fault) or "DataDependent" in type(fault).__name__:
                raise SmeltError(
                    f"{where}: it needs values that are known only when the graph runs; such graphs cannot be captured"
                ) from fault
            raise SmeltError(f"{where}: fails: {first_line(fault)}") from fault
        if len(values) < sum(bool(name) for name in node.outputs):
            raise SmeltError(f"{where}: only its first {len(values)} outputs can be imported yet")
        carry(node.op, inputs, values)
        return values

    def _result(
        self, node: Node, inputs: list[Any], attributes: dict[str, Any], scope: Scope, where: str
    ) -> tuple[Any, ...]:
        function = self.model.functions.get((node.domain, node.op))
        if function is None:
            known = self._known(node, inputs, attributes)
            if known is not None:
                return known
            rule = find(node.domain, node.op, node.version or 1 << 30)
            if rule is not None:
                return self._ruled(rule, node, inputs, attributes, scope, where)
            function = self._schema(node)
        if function is None:
            raise SmeltError(f"{where}: {refusal(node.domain, node.op)}")
        inner: Scope = dict(zip(function.inputs, [*inputs, *[None] * len(function.inputs)], strict=False))
        told = {name: attributes.get(name, default) for name, default in function.attributes.items()}
        self._run(function.nodes, inner, set(function.outputs), told)
        return tuple(self._value(inner.get(name)) for name in function.outputs)

    def _known(self, node: Node, inputs: list[Any], attributes: dict[str, Any]) -> tuple[Any, ...] | None:
        if node.domain or not inputs or not all(isinstance(v, Known) or v is None for v in inputs):
            return None
        if node.op == "Cast":
            made = cast(inputs[0], self._dtype(attributes["to"], node.label))
            return None if made is None else (made,)
        return compute(node.op, inputs, attributes)

    def _ruled(
        self, rule: Rule, node: Node, inputs: list[Any], attributes: dict[str, Any], scope: Scope, where: str
    ) -> tuple[Any, ...]:
        refuse_attributes(rule, where, attributes)
        if len(inputs) < rule.required or (len(inputs) > len(rule.inputs) and rule.rest is None):
            raise SmeltError(f"{where}: has {len(inputs)} inputs, which does not fit the op")
        kinds = [*rule.inputs[: len(inputs)], *[rule.rest or ""] * (len(inputs) - len(rule.inputs))]
        beside = [v for kind, v in zip(kinds, inputs, strict=True) if kind == OPERAND and isinstance(v, torch.Tensor)]
        values = [self._as(kind, value, beside) for kind, value in zip(kinds, inputs, strict=True)]
        for name, hint in rule.attributes.items():
            value = attributes.get(name)
            if value is None:
                attributes.pop(name, None)
            elif hint == DType or hint == DType | None:
                attributes[name] = self._dtype(value, where)
            elif hint == Kind or hint == Kind | None:
                attributes[name] = Kind(value, self._dtype(value, where))
            elif hint == Body or hint == Body | None:
                attributes[name] = self._body(value, scope)
            elif isinstance(value, Stored) and hint == Value:
                attributes[name] = replace(self._constant(value), name=None) if is_small(value) else self._value(value)
            elif isinstance(value, Stored):
                attributes[name] = self._wide(value.read())
        if rule.counts_outputs:
            attributes["outputs"] = len(node.outputs)
        if self.replaced and rule.name == "Reshape":
            values[1] = _widened(values[0], values[1])
        if self.doubting:
            require_room(rule.function, values, attributes)
        made = rule.function(*values, **attributes)
        return tuple(made) if isinstance(made, tuple) else (made,)

    def _as(self, kind: str, value: Any, beside: list[torch.Tensor]) -> Any:
        """An input as its rule wants it; `beside` are the tensors among the operands, one of which gives the type."""
        if value is None:
            return None
        if kind == TENSOR:
            return self._tensor(value)
        if kind in (INTS, NUMBER):
            numbers = value.numbers() if isinstance(value, Known) else value.reshape(-1).tolist()
            return tuple(numbers) if kind == INTS else numbers[0]
        if kind == OPERAND and isinstance(value, Known):
            if value.array.size == 1 and any(other.dim() >= len(value.shape) for other in beside):
                return value.numbers()[0]
            return self._tensor(value)
        return value

    def _tensor(self, value: Any) -> Any:
        """A tensor for what is known: the stored one where there is a placeholder for it."""
        if isinstance(value, Known):
            return self.held[value.name] if value.name in self.held else value.tensor()
        return value

    def _body(self, graph: Graph, scope: Scope) -> Body:
        """A graph attribute as a function of its inputs, in the scope of its node."""

        def call(*values: Any) -> tuple[Any, ...]:
            inner = {**scope, **dict(zip((port.name for port in graph.inputs), values, strict=True))}
            return self.run(graph, inner)

        return call

    def _attributes(self, node: Node, given: Mapping[str, Any]) -> dict[str, Any]:
        found = {n: given.get(v.name) if isinstance(v, Reference) else v for n, v in node.attributes.items()}
        return {name: value for name, value in found.items() if value is not None}

    def _schema(self, node: Node) -> Function | None:
        key = (node.domain, node.op)
        if key not in self._bodies:
            self._bodies[key] = schema_function(node, self.model.opsets)
        return self._bodies[key]

    def _constant(self, stored: Stored) -> Any:
        """A small tensor as known numbers; anything else as it is stored, read when it is used."""
        if stored.name in self.weights or not is_small(stored):
            return stored
        dtype = stored.dtype if self.exact or not stored.dtype.is_floating_point else torch.float32
        return Known(stored.array().astype(numpy_type(dtype)), dtype, stored.name)

    def _value(self, value: Any) -> Any:
        if not isinstance(value, Stored):
            return value
        if self.model.graph.tensors.get(value.name) is value:
            if value.name in self.held:
                return marked(self.held[value.name], value.kind)
            if value.name in self.weights:
                return self.weights[value.name].dense()
        return marked(self._wide(value.read()), value.kind)

    def _wide(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.exact or not tensor.is_floating_point() else tensor.float()

    def _dtype(self, kind: int, where: str) -> torch.dtype:
        dtype = dtype_of(kind, where)
        return dtype if self.exact or not dtype.is_floating_point else torch.float32


def is_small(stored: Stored) -> bool:
    """Whether a tensor is taken for numbers: sizes, axes, indices, and scalars of any type."""
    if stored.count > MOST or len(stored.shape) > 2 or not has_numpy_type(stored.dtype) or stored.kind in NARROW:
        return False
    return stored.count == 1 or not stored.dtype.is_floating_point


def _widened(x: torch.Tensor, to: tuple[Any, ...]) -> tuple[Any, ...]:
    """A shape for x whose first size is 1, as for positions counted once for all rows; now each has its own."""
    one_row = len(to) > 1 and isinstance(to[0], int) and to[0] == 1
    return (x.shape[0], *to[1:]) if one_row and isinstance(x.shape[0], torch.SymInt) else to


def reads(node: Node) -> Iterable[str]:
    """Names that a node reads, those of its inner graphs among them."""
    yield from filter(None, node.inputs)
    for value in node.attributes.values():
        if isinstance(value, Graph):
            for inner in value.nodes:
                yield from reads(inner)
            yield from (port.name for port in value.outputs)
