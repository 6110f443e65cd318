"""Whether two Programs compute alike, told from their graphs alone: what needs no replay to be called exact."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import fx

from ..ir.program import Program


def same_computation(before: Program, after: Program) -> bool:
    """Whether `after` computes the logits of `before` by the same ops from the same weights and cache plan.

    Every output counts where none is called logits, and so does the depth plan. Names of nodes and weights, dead nodes
    and further outputs do not count; a weight is the same when it is the same object.
    """
    if before.cache != after.cache or before.depth != after.depth:
        return False
    table: dict[Hashable, int] = {}
    mine, others = _outputs(before, table, by_name=False), _outputs(after, table, by_name=False)
    return all(mine[name] == others.get(name) for name in (("logits",) if "logits" in mine else mine))


def same_graph(before: Program, after: Program) -> bool:
    """Whether the outputs are computed by the same ops from weights of the same names, whatever these hold."""
    table: dict[Hashable, int] = {}
    return _outputs(before, table, by_name=True) == _outputs(after, table, by_name=True)


def _outputs(program: Program, table: dict[Hashable, int], by_name: bool) -> dict[str, int]:
    """The number of each output's value; equal expressions have equal numbers within one table."""
    number: dict[fx.Node, int] = {}

    def frozen(part: Any) -> Hashable:
        if isinstance(part, fx.Node):
            return ("node", number[part])
        if isinstance(part, list | tuple):
            return ("list", *(frozen(item) for item in part))
        if isinstance(part, dict):
            return ("dict", *((name, frozen(item)) for name, item in sorted(part.items())))
        if isinstance(part, slice):
            return ("slice", frozen(part.start), frozen(part.stop), frozen(part.step))
        return (type(part).__name__, part)  # with its type: 1, 1.0 and True are equal, and mean different ops

    for node in program.graph.nodes:
        if node.op == "output":
            continue
        if node.op == "get_attr" and not by_name:
            key: Hashable = ("weight", program.weights[str(node.target)])
        else:
            key = (node.op, node.target, frozen(node.args), frozen(node.kwargs))
            if node.op == "placeholder":
                key = (node.op, str(node.target))
        number[node] = table.setdefault(key, len(table))
    return {name: number[node] for name, node in program.outputs.items()}
