"""From torch.export to a Program graph: parameters become named weights, bookkeeping nodes go."""

from __future__ import annotations

import io
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import config as fx_config

from ..errors import SmeltError
from ..program import Program
from ..weight import Weight

aten = torch.ops.aten
_COMPARISONS = {operator.ge, operator.le, operator.gt, operator.lt, operator.eq, operator.ne}
_TRACES = "do_not_emit_stack_traces"  # torch 2.11 does not know it
_LOUD = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")


class ExportError(SmeltError):
    """torch.export found a construct that it cannot trace."""


def export(module: nn.Module, example: tuple[Any, ...], shapes: Any, name: str) -> ExportedProgram:
    """torch.export without its log, as a graph that writes into nothing; what it cannot trace is an ExportError."""
    try:
        with _quiet(), torch.no_grad():
            exported = torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
            # a second trace that costs as much as the first
            return exported.run_decompositions({}) if _writes(exported) else exported
    except SmeltError:
        raise
    except Exception as fault:  # export raises dozens of kinds; each means a construct it cannot trace
        raise ExportError(f"{name}: cannot be captured yet: {_reason(fault)}") from fault


def _writes(exported: ExportedProgram) -> bool:
    calls = (node.target for node in exported.graph.nodes if node.op == "call_function")
    return any(isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable for target in calls)


def _reason(fault: Exception) -> str:
    if "data-dependent" in str(fault) or "DataDependent" in type(fault).__name__:
        return (
            "it branches on values that are known only when it runs, and a graph takes one way; "
            "express the choice as torch.where"
        )
    if "Constraints violated" in str(fault):
        because = next((line for line in str(fault).splitlines() if line.strip().startswith("- ")), "")
        return f"its graph would hold for some lengths or batch sizes only {because.strip()[:300]}".strip()
    return f"torch.export stops at: {first_line(fault)}"


def first_line(fault: Exception) -> str:
    """What an exception of a library says first, cut to a length that one can read."""
    lines = (line.strip() for line in str(fault).splitlines())
    return next(filter(None, lines), type(fault).__name__)[:300]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in evaluation mode; every part goes back to the mode it had."""
    before = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training


@contextmanager
def _quiet() -> Iterator[None]:
    """torch logs tracebacks and prints half a graph when it stops; the error says what matters."""
    loggers = [logging.getLogger(name) for name in _LOUD]
    before, traces = [logger.disabled for logger in loggers], getattr(fx_config, _TRACES, False)
    for logger in loggers:
        logger.disabled = True
    setattr(fx_config, _TRACES, True)  # to record them takes a tenth of a trace, and no Program keeps them
    try:
        with redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch about itself
            yield
    finally:
        setattr(fx_config, _TRACES, traces)
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


def to_program(
    exported: ExportedProgram,
    name: str,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    weight: Callable[[str], Weight],
    canonical: Mapping[str, str],
) -> Program:
    """A Program over the exported graph of a wrapper that holds the model as `model`.

    `inputs` and `outputs` name the user's inputs and results in order; `weight(name)` gives the value of a parameter or
    buffer; `canonical` maps the names of tied tensors to the one that stays. A weight is read where it is used, by a
    node of its own for each use, so that evaluating the graph holds few decoded weights at a time.
    """
    if kept := [spec for spec in exported.graph_signature.output_specs if spec.kind is not OutputKind.USER_OUTPUT]:
        what = str(kept[0].target).removeprefix("model.") if "BUFFER" in kept[0].kind.name else "an input"
        raise SmeltError(f"{name}: the model writes into {what} while it runs, which cannot be captured yet")
    graph, constants = fx.Graph(), dict[str, Weight]()
    values: dict[fx.Node, fx.Node] = {}
    stored: dict[fx.Node, str] = {}
    names = iter(inputs)
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs if hasattr(spec.arg, "name")}

    def use(node: fx.Node) -> fx.Node:
        if node not in stored:
            return values[node]
        read = graph.create_node("get_attr", stored[node])
        read.meta["val"] = node.meta.get("val")
        return read

    for node in exported.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            if spec.kind is InputKind.USER_INPUT:
                values[node] = graph.placeholder(next(names))
                values[node].meta["val"] = node.meta.get("val")
            elif node.users:
                stored[node] = _stored(exported, spec, name, canonical, constants)
        elif node.op == "output":
            results = node.args[0]
            if len(results) != len(outputs):
                raise SmeltError(f"{name}: the model returns {len(results)} tensors, expected {len(outputs)}")
            if not all(isinstance(result, fx.Node) for result in results):
                raise SmeltError(f"{name}: the model returns something other than tensors, which cannot be captured")
            graph.output({out: use(result) for out, result in zip(outputs, results, strict=True)})
        elif node.op == "call_function":
            if not _is_check(node):
                values[node] = _copied(node, graph, use, name)
        else:
            raise SmeltError(f"{name}: a graph node of kind {node.op} ({node.target}) cannot be captured yet")
    graph.lint()
    program = Program(name, graph, {})
    program.prune()  # before weights are asked for: a checkpoint may lack what no output needs
    read = dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "get_attr")
    program.weights = {target: constants[target] if target in constants else weight(target) for target in read}
    return program


def _stored(
    exported: ExportedProgram, spec: Any, name: str, canonical: Mapping[str, str], constants: dict[str, Weight]
) -> str:
    """Name of a tensor that the graph reads beside its inputs; the values of constants are put into the table."""
    if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
        target = str(spec.target).removeprefix("model.")
        return canonical.get(target, target)
    if spec.kind is not InputKind.CONSTANT_TENSOR:
        raise SmeltError(f"{name}: an input of kind {spec.kind.name} cannot be captured yet")
    value = exported.constants[spec.target]
    if not isinstance(value, torch.Tensor) or value.is_meta:
        raise SmeltError(f"{name}: the constant {spec.target} has no value to capture")
    constants[str(spec.target)] = Weight.of(value)
    return str(spec.target)


def _copied(node: fx.Node, graph: fx.Graph, use: Callable[[fx.Node], fx.Node], name: str) -> fx.Node:
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        raise SmeltError(f"{name}: control flow ({node.target}) inside the model cannot be captured yet")
    copied = graph.node_copy(node, use)
    copied.meta = {"val": node.meta.get("val")}
    # the graph may have been traced on the meta device; a Program names no device
    copied.kwargs = {key: value for key, value in copied.kwargs.items() if key not in ("device", "pin_memory")}
    if copied.target is aten.to.device:
        copied.target, copied.args = aten.to.dtype, (copied.args[0], node.meta["val"].dtype)
    if any(isinstance(argument, torch.device) for argument in copied.args):
        raise SmeltError(f"{name}: {node.target} names a device in the graph, which cannot be captured yet")
    return copied


def _is_check(node: fx.Node) -> bool:
    """Guards on symbolic sizes and tensor metadata; the verifier does their work."""
    text = str(node.target)
    if "_assert" in text or "sym_constrain" in text:
        return True
    return node.target in _COMPARISONS and all(_is_check(user) for user in node.users)
