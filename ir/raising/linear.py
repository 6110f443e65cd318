"""Matrix products with a stored weight, and row lookups."""

from __future__ import annotations

import torch
from torch import fx

from ..encoding import Dense
from ..ops import EMBEDDING, LINEAR
from ..program import Program
from ..weight import Transposed, Weight

aten = torch.ops.aten


def raise_linear(program: Program) -> int:
    """aten.linear(x, W, b) and, for weights stored [K, N] (Conv1D of GPT-2), addmm(b, x, W) → linear."""
    count = 0
    for node in program.calls(aten.linear.default):
        node.target = LINEAR.target
        count += 1
    for node in program.calls(aten.addmm.default):
        bias, x, weight = node.args[:3]
        if not (_is_weight(bias) and _is_weight(weight)) or len(node.args) > 3 or node.kwargs:
            continue
        assert isinstance(weight, fx.Node)
        name = str(weight.target)
        with program.graph.inserting_before(node):
            turned = program.weight_node(f"{name}.transposed", _transposed(program.weights[name]))
            node.replace_all_uses_with(program.graph.call_function(LINEAR.target, (x, turned, bias)))
        program.graph.erase_node(node)
        count += 1
    return count


def raise_embedding(program: Program) -> int:
    """aten.embedding(W, ids, …) → embedding(ids, W); padding index and gradients mean nothing here."""
    count = 0
    for node in program.calls(aten.embedding.default):
        weight, ids = node.args[:2]
        node.args, node.kwargs, node.target = (ids, weight), {}, EMBEDDING.target
        count += 1
    return count


def _is_weight(value: object) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _transposed(weight: Weight) -> Weight:
    if not isinstance(weight.encoding, Dense):
        raise TypeError("raising runs before any encoding")
    return Weight(weight.shape[::-1], weight.encoding, Transposed(weight.parts))
