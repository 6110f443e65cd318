"""From torch.export to a Program graph: parameters become named weights, bookkeeping nodes go."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from ..errors import SmeltError
from ..program import Program
from ..weight import Weight

aten = torch.ops.aten
# what these return is their first argument, in a graph that is only evaluated
_PASS_THROUGH = {
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
    aten.detach_.default,
    aten.dropout.default,
    aten.feature_dropout.default,
}
_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.contiguous.default, aten.clone.default, aten.type_as.default}


def to_program(
    exported: ExportedProgram,
    name: str,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    weight: Callable[[str], Weight],
    canonical: Mapping[str, str],
) -> Program:
    """A Program over the exported graph.

    `inputs` and `outputs` name the user's inputs and results in order; `weight(name)` gives the value of a parameter or
    buffer; `canonical` maps the names of tied tensors to the one that stays.
    """
    signature = exported.graph_signature
    graph = fx.Graph()
    table: dict[fx.Node, fx.Node] = {}
    weights: dict[str, Weight] = {}
    names = iter(inputs)
    specs = {spec.arg.name: spec for spec in signature.input_specs if hasattr(spec.arg, "name")}
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            if spec.kind is InputKind.USER_INPUT:
                table[node] = graph.placeholder(next(names))
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                if not node.users:
                    continue
                assert spec.target is not None
                target = canonical.get(spec.target, spec.target)
                weights.setdefault(target, weight(target))
                table[node] = graph.create_node("get_attr", target)
            elif spec.kind is InputKind.CONSTANT_TENSOR:
                if not node.users:
                    continue
                assert spec.target is not None
                value = exported.constants[spec.target]
                if not isinstance(value, torch.Tensor) or value.is_meta:
                    raise SmeltError(f"{name}: the constant {spec.target} has no value to capture")
                weights[spec.target] = Weight.of(value)
                table[node] = graph.create_node("get_attr", spec.target)
            else:
                raise SmeltError(f"{name}: an input of kind {spec.kind.name} cannot be captured yet")
        elif node.op == "output":
            results = node.args[0]
            if len(results) != len(outputs):
                raise SmeltError(f"{name}: the model returns {len(results)} tensors, expected {len(outputs)}")
            graph.output({out: table[result] for out, result in zip(outputs, results, strict=True)})
        elif node.op == "call_function":
            _copy_call(node, graph, table)
        else:
            raise SmeltError(f"{name}: a graph node of kind {node.op} ({node.target}) cannot be captured yet")
    program = Program(name, graph, weights)
    program.prune()
    graph.lint()
    return program


def strip_prefix(exported: ExportedProgram) -> None:
    """Parameter and buffer names without the `model.` of the wrapper that was exported."""
    for spec in exported.graph_signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target is not None:
            spec.target = spec.target.removeprefix("model.")


def _copy_call(node: fx.Node, graph: fx.Graph, table: dict[fx.Node, fx.Node]) -> None:
    if node.target in _PASS_THROUGH or _is_plain_cast(node):
        table[node] = table[node.args[0]]  # type: ignore[index]
        return
    if _is_check(node):
        return
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        raise SmeltError(f"control flow ({node.target}) inside the model cannot be captured yet")
    table[node] = copied = graph.node_copy(node, lambda n: table[n])
    copied.meta = {"val": node.meta.get("val")}
    # the graph was traced on the meta device; a Program names no device
    copied.kwargs = {k: v for k, v in copied.kwargs.items() if k not in ("device", "pin_memory")}
    if copied.target is aten.to.device:
        copied.target, copied.args = aten.to.dtype, (copied.args[0], node.meta["val"].dtype)
    if any(isinstance(a, torch.device) for a in copied.args):
        raise SmeltError(f"{node.target} names a device in the graph and cannot be captured yet")


def _is_check(node: fx.Node) -> bool:
    """Guards on symbolic sizes and tensor metadata; the verifier does their work."""
    text = str(node.target)
    return "_assert" in text or "sym_constrain" in text or (node.target in _COMPARISONS and not _feeds_data(node))


_COMPARISONS = {operator.ge, operator.le, operator.gt, operator.lt, operator.eq, operator.ne}


def _feeds_data(node: fx.Node) -> bool:
    return any(not _is_check(user) for user in node.users)


def _is_plain_cast(node: fx.Node) -> bool:
    """A cast or copy that changes neither type nor shape."""
    if node.target not in _CASTS:
        return False
    before: Any = node.args[0].meta.get("val")  # type: ignore[union-attr]
    after: Any = node.meta.get("val")
    return isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor) and before.dtype == after.dtype
