"""Matrix products with a stored weight, the vocabulary head among them, and row lookups."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..encoding import Dense
from ..ops import EMBEDDING, HEAD, LINEAR, arguments
from ..program import Program
from ..weight import Transposed, Weight
from .match import Call, Hole, match, rewrite

aten = torch.ops.aten
_POINTWISE = {aten.div.Tensor, aten.tanh.default, aten.mul.Tensor, aten.to.dtype, aten._to_copy.default}
_STORED = Hole("weight")
_TURNED = tuple(
    Call((target,), (_STORED, *dims))
    for target, dims in (
        (aten.t.default, ()),
        (aten.numpy_T.default, ()),
        (aten.transpose.int, (0, 1)),
        (aten.transpose.int, (1, 0)),
        (aten.transpose.int, (-2, -1)),
        (aten.transpose.int, (-1, -2)),
    )
)


def raise_linear(program: Program) -> int:
    """aten.linear(x, W, b), addmm(b, x, W) (Conv1D of GPT-2) and matmul(x, W) or (x, Wᵀ) → linear."""
    count = 0
    for node in program.calls(aten.linear.default):
        node.target = LINEAR.target
        count += 1
    for node in program.calls(aten.addmm.default, aten.matmul.default, aten.mm.default):
        scaled = bool(node.kwargs) or len(node.args) > 3
        bias, x, weight = node.args if node.target is aten.addmm.default and not scaled else (None, *node.args[:2])
        if scaled or not (bias is None or _is_stored(bias, 1)) or not isinstance(x, fx.Node) or x.meta["val"].dim() < 2:
            continue
        with program.graph.inserting_before(node):
            matrix = _rows_first(program, weight)
        if matrix is None:
            continue
        rewrite(program, node, LINEAR, x, matrix, bias)
        count += 1
    return count


def raise_head(program: Program) -> int:
    """The last linear before `logits`, behind elementwise ops at most → head."""
    node = program.outputs.get("logits")
    while node is not None and node.target in _POINTWISE:
        node = next((a for a in node.args if isinstance(a, fx.Node)), None)
    if node is None or node.target is not LINEAR.target:
        return 0
    node.target = HEAD.target
    return 1


def raise_embedding(program: Program) -> int:
    """aten.embedding(W, ids, …) → embedding(ids, W); padding index and gradients mean nothing here."""
    count = 0
    for node in program.calls(aten.embedding.default):
        a = arguments(node)
        node.args, node.kwargs, node.target = (a["indices"], a["weight"]), {}, EMBEDDING.target
        count += 1
    return count


def _rows_first(program: Program, weight: Any) -> fx.Node | None:
    """A node with the [N, K] matrix for the right factor [K, N] of a product, or None if that is not stored."""
    for pattern in _TURNED:
        found = match(pattern, weight)
        if found is not None and _is_stored(found["weight"], 2):
            node: fx.Node = found["weight"]
            return node
    if not _is_stored(weight, 2):
        return None
    name = str(weight.target)
    turned = program.weight_node(f"{name}.transposed", _transposed(program.weights[name]))
    turned.meta["val"] = weight.meta["val"].t()
    return turned


def _is_stored(value: object, dims: int) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr" and value.meta["val"].dim() == dims


def _transposed(weight: Weight) -> Weight:
    if not isinstance(weight.encoding, Dense):
        raise TypeError("raising runs before any encoding")
    return Weight(weight.shape[::-1], weight.encoding, Transposed(weight.parts))
