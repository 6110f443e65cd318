"""Asks a graph the same thing in several ways at once: variants of it side by side, over weights read once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from ..ops import ATTENTION, arguments, is_op
from ..program import Program
from ..weight import Weight

TOLERANCE = 1e-4  # relative to the largest output, fp32

Attend = Callable[[dict[str, Any]], dict[str, Any]]  # an attention's arguments, changed

# a decoder's tokens that see themselves only: in one sequence, and as sequences of one
ALONE: dict[str, Attend] = {
    ".alone": lambda a: a | {"window": 1},
    ".one": lambda a: a,
}


def alone_inputs(tokens: torch.Tensor, positions: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs for the variants ALONE of tokens and positions [1, T]."""
    alone = {"tokens.alone": tokens, "positions.alone": positions}
    return alone | {"tokens.one": tokens.reshape(-1, 1), "positions.one": positions.reshape(-1, 1)}


def mixed_tokens(answers: Mapping[str, torch.Tensor]) -> str | None:
    """None if the answers of the variants ALONE agree; else says that something besides attention mixes tokens."""
    error = relative_error(answers["logits.alone"][0], answers["logits.one"][:, 0])
    if error <= TOLERANCE:
        return None
    return (
        f"tokens depend on each other outside causal attention (relative error {error:.1e}), as with recurrent or "
        "convolutional layers, or positions that are counted instead of taken from the input; generating with a cache "
        "would give wrong tokens"
    )


def side_by_side(program: Program, variants: Mapping[str, Attend]) -> Program:
    """One graph of several variants that share the weights' nodes; inputs and outputs carry the variant's suffix.

    A variant changes the arguments of attention; a string among them is an input to be added.
    """
    graph = fx.Graph()
    tables: dict[str, dict[fx.Node, fx.Node]] = {variant: {} for variant in variants}
    added: dict[str, fx.Node] = {}

    def node_of(table: dict[fx.Node, fx.Node], argument: Any) -> Any:
        if isinstance(argument, str):
            return added.setdefault(argument, graph.placeholder(argument)) if argument not in added else added[argument]
        return fx.node.map_arg(argument, table.__getitem__)

    for node in program.graph.nodes:
        if node.op == "get_attr":
            shared = graph.create_node("get_attr", node.target)
        for variant, table in tables.items():
            if node.op == "get_attr":
                table[node] = shared
            elif node.op == "placeholder":
                table[node] = graph.placeholder(f"{node.target}{variant}")
            elif is_op(node, ATTENTION):
                changed = variants[variant](arguments(node))
                kwargs = {name: node_of(table, argument) for name, argument in changed.items()}
                table[node] = graph.call_function(node.target, kwargs=kwargs)
            elif node.op == "call_function":
                table[node] = graph.node_copy(node, table.__getitem__)
    outputs = program.outputs.items()
    graph.output({f"{name}{variant}": table[node] for variant, table in tables.items() for name, node in outputs})
    return Program(program.name, graph, program.weights)


def relative_error(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference over the largest value of `theirs`."""
    scale = theirs.float().abs().max().clamp_min(1e-30)
    return float((mine.float() - theirs.float()).abs().max() / scale)


def broken_weight(weights: Mapping[str, Weight]) -> str:
    """What to say of outputs that are not finite."""
    for name, weight in weights.items():
        tensor = weight.parts["data"]
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return f"weight '{name}' holds NaN or infinite values"
    return "every weight is finite, so an op overflows"
