"""Activations that are rounded to codes and back, as smelt exports it: found among ONNX's ops, and one op again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from onnx import TensorProto

from .graph import Graph, Node
from .load import Model
from .stored import Stored

_BITS = {float(2 ** (bits - 1) - 1): bits for bits in range(2, 9)}


def with_rounding(model: Model) -> Model:
    """The model with smelt.Quantized(x) for QuantizeLinear and DequantizeLinear by a group's own greatest value."""
    finder = _Finder(model.graph)
    nodes = tuple(finder.rounded(node) or node for node in model.graph.nodes)
    return replace(model, graph=replace(model.graph, nodes=nodes))


class _Finder:
    def __init__(self, graph: Graph) -> None:
        self.tensors: Mapping[str, Stored] = graph.tensors
        self.made_by = {name: node for node in graph.nodes for name in node.outputs}

    def rounded(self, node: Node) -> Node | None:
        """Dequantize(Quantize(x, s), s) with s = max|x| / levels of each group, 1 where that is 0."""
        quantize = self._made(node, 0, "QuantizeLinear") if self._is(node, "DequantizeLinear", 2) else None
        if quantize is None or len(quantize.inputs) != 2 or quantize.inputs[1] != node.inputs[1]:
            return None
        told, again = quantize.attributes, node.attributes
        group, axis = told.get("block_size", 0), told.get("axis", 1)
        if group < 1 or told.get("output_dtype") != TensorProto.INT8:
            return None
        if (again.get("block_size", 0), again.get("axis", 1)) != (group, axis):
            return None
        levels = self._levels(quantize, axis, group)
        if levels is None or levels not in _BITS:
            return None
        attributes = {"bits": _BITS[levels], "group": group}
        return replace(
            node, domain="smelt", op="Quantized", version=0, inputs=quantize.inputs[:1], attributes=attributes
        )

    def _levels(self, quantize: Node, axis: int, group: int) -> float | None:
        """What the greatest value of a group is divided by for its scale; None for any other scale."""
        where = self._made(quantize, 1, "Where")
        equal = self._made(where, 0, "Equal")
        divide = self._made(where, 2, "Div")
        peak = self._made(divide, 0, "ReduceMax")
        reshape = self._made(self._made(peak, 0, "Abs"), 0, "Reshape")
        if where is None or equal is None or divide is None or peak is None or reshape is None:
            return None
        apart, axes = self._numbers(reshape, 1), self._numbers(peak, 1)
        fits = apart is not None and apart[-1] == group and axis == len(apart) - 2 and axes == [len(apart) - 1]
        same = reshape.inputs[0] == quantize.inputs[0] and equal.inputs[0] == divide.outputs[0]
        if not fits or not same or peak.attributes.get("keepdims", 1):
            return None
        if self._numbers(where, 1) != [1.0] or self._numbers(equal, 1) != [0.0]:
            return None
        levels = self._numbers(divide, 1)
        return levels[0] if levels is not None and len(levels) == 1 else None

    def _is(self, node: Node | None, op: str, inputs: int) -> bool:
        return node is not None and not node.domain and node.op == op and len(node.inputs) == inputs

    def _made(self, node: Node | None, index: int, op: str) -> Node | None:
        """The node of that op that computes an input."""
        if node is None or index >= len(node.inputs):
            return None
        made = self.made_by.get(node.inputs[index])
        return made if made is not None and not made.domain and made.op == op else None

    def _numbers(self, node: Node, index: int) -> list[float] | None:
        """A small stored input."""
        stored = self.tensors.get(node.inputs[index]) if index < len(node.inputs) else None
        if stored is None or not 0 < stored.count <= 8:
            return None
        return [float(number) for number in stored.array().reshape(-1)]
