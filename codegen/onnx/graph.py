"""A Program as an ONNX graph in a style: inputs, one form a node, outputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import fx

from ...ir.program import Program
from ...ir.shapes import derive
from .builder import Builder, Value
from .forms import write_node
from .styles import Style
from .weights import decoded

Progress = Callable[[str, int, int], None]  # what is being done, how much of it is, and how much there is


def build(program: Program, style: Style, progress: Progress, allow_decoded: bool = False) -> Builder:
    """The graph of a Program; raises SmeltError naming the node or weight that has no form."""
    derive(program)
    builder = Builder(program.name, partial(decoded, program))
    values: dict[fx.Node, Any] = {}
    builder.shared |= {"program": program, "style": style, "values": values, "allow_decoded": allow_decoded}
    given = style.inputs(builder, program)
    nodes = list(program.graph.nodes)
    for number, node in enumerate(nodes):
        if node.op == "placeholder":
            values[node] = given[str(node.target)]
        elif node.op == "get_attr":
            values[node] = Value("", node.meta["shape"], node.meta["dtype"], str(node.target))
        elif node.op == "output":
            style.outputs(builder, program, {name: values[made] for name, made in node.args[0].items()})
        else:
            values[node] = write_node(builder, node, style.name, values)
        progress("writing nodes", number + 1, len(nodes))
    drop_dead(builder)
    return builder


def drop_dead(builder: Builder) -> set[str]:
    """Drops nodes and initialisers that no output needs: a form may make in vain what another reads through.

    Returns the names that are needed.
    """
    needed = {output.name for output in builder.outputs}
    kept = []
    for node in reversed(builder.nodes):
        if needed.intersection(filter(None, node.output)):
            needed.update(node.input)
            kept.append(node)
    builder.nodes = kept[::-1]
    builder.tensors = {name: tensor for name, tensor in builder.tensors.items() if name in needed}
    return needed
