"""Tells a decoder among plain token modules, and makes its positions an input."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..ops import ATTENTION, EMBEDDING, arguments, is_op
from ..program import Program
from ..raising.match import rewrite
from ..weight import Weight

aten = torch.ops.aten
_RANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)


def as_decoder(program: Program) -> str | None:
    """Makes a raised Program with one token input and one output [B, T, V] over causal attention a decoder, in place.

    `arange(T)` that a table of positions is looked up with, or the first T rows of such a table, become look-ups by the
    input `positions`. Returns None, or, with the Program left alone, what stands in the way.
    """
    attention = [arguments(node) for node in program.calls(ATTENTION)]
    tokens = next(node for node in program.graph.nodes if node.op == "placeholder")
    words = next((arguments(n)["weight"] for n in program.calls(EMBEDDING) if arguments(n)["ids"] is tokens), None)
    if not attention or not all(a["causal"] and a["mask"] is None for a in attention):
        return "it needs scaled_dot_product_attention with is_causal=True and no mask, everywhere"
    if words is None:
        return "no embedding looks up its tokens"
    (output,) = program.outputs.values()
    if output.meta["val"].dim() != 3:
        return "its output is not [B, T, V]"
    lookups, rows = _lookups(program), _first_rows(program)
    if lookups is None:
        return "it uses arange for more than rows of a table of positions"
    with program.graph.inserting_after(tokens):
        positions = program.graph.placeholder("positions")
    positions.meta = dict(tokens.meta)
    tables = [_by_position(program, node, positions) for node in rows]
    for node in lookups:
        tables.append(str(arguments(node)["weight"].target))
        node.args = (positions, *node.args[1:])
    tokens.target = tokens.name = "tokens"
    program.graph.output_node().args = ({"logits": output},)
    program.prune()
    vocabulary, hidden = program.weights[str(words.target)].shape
    context = min((program.weights[name].shape[0] for name in tables), default=None)
    program.facts |= {"kind": "decoder", "family": program.name, "eos": []}
    program.facts |= {"vocabulary": vocabulary, "hidden": hidden, "context": context}
    del program.facts["inputs"]
    return None


def _lookups(program: Program) -> list[fx.Node] | None:
    """The embeddings that look up `arange(T)`; None if something else reads one."""
    found: list[fx.Node] = []
    pending = list(program.calls(*_RANGES))
    for node in pending:
        for user in node.users:
            if user.target is aten.unsqueeze.default and user.args[1] == 0:
                pending.append(user)
            elif is_op(user, EMBEDDING) and user.args[0] is node:
                found.append(user)
            else:
                return None
    return found


def _first_rows(program: Program) -> list[fx.Node]:
    """`table[:T]` or `table[:, :T]` of a stored table that is added to something."""
    found = []
    for node in program.calls(aten.slice.Tensor):
        table, *where = node.args
        if not isinstance(table, fx.Node) or table.op != "get_attr":
            continue
        shape: torch.Size = table.meta["val"].shape
        dim = len(shape) - 2
        is_table = dim == 0 or (dim == 1 and shape[0] == 1)
        is_first = where[:2] in ([dim, 0], [dim, None]) and len(where) == 3 and isinstance(where[2], fx.Node)
        if is_table and is_first and all(user.target is aten.add.Tensor for user in node.users):
            found.append(node)
    return found


def _by_position(program: Program, node: fx.Node, positions: fx.Node) -> str:
    """Rewrites the first rows of a table to a look-up; returns the name of the table as a matrix."""
    source: Any = node.args[0]
    weight = program.weights[str(source.target)]
    name = str(source.target)
    if len(weight.shape) == 3:
        name = f"{name}.rows"
        program.weights[name] = Weight.of(weight.parts["data"][0])
    with program.graph.inserting_before(node):
        table = program.weight_node(name)
    rewrite(program, node, EMBEDDING, positions, table)
    return name
