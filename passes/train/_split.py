"""Cuts a Program at one node: a frozen trunk that computes it, and a branch that starts from it and can be trained."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from ...ir.program import Program


def trunk(program: Program, outputs: Mapping[str, fx.Node]) -> Program:
    """A Program of the same inputs whose outputs are the values of these nodes; weights are shared."""
    part = program.fork()
    found = {name: _twin(part, node) for name, node in outputs.items()}
    end(part, found)
    return part


def branch(program: Program, at: fx.Node, output: str) -> Program:
    """A Program from the input `hidden`, the value of node `at`, to one output; weights are shared."""
    part = program.fork()
    cut, result = _twin(part, at), part.outputs[output]
    with part.graph.inserting_before(next(iter(part.graph.nodes))):
        hidden = part.graph.placeholder("hidden")
    cut.replace_all_uses_with(hidden)
    end(part, {output: result})
    for node in part.graph.find_nodes(op="placeholder"):
        if node is not hidden and not node.users:
            part.graph.erase_node(node)
    return part


def end(part: Program, outputs: Mapping[str, fx.Node]) -> None:
    """Give a Program these outputs instead of its own, and drop what they do not need."""
    part.graph.erase_node(next(iter(reversed(part.graph.nodes))))
    part.graph.output(dict(outputs))
    part.prune()


def _twin(part: Program, node: fx.Node) -> fx.Node:
    """The node of a fork that copies `node`."""
    (twin,) = (other for other in part.graph.nodes if other.name == node.name)
    assert isinstance(twin, fx.Node)
    return twin
