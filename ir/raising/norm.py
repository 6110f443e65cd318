"""Normalisations, from their ATen call or from their arithmetic."""

from __future__ import annotations

import torch
from torch import fx

from ..ops import LAYER_NORM, RMS_NORM, arguments
from ..program import Program
from .match import Call, Hole, match, rewrite

aten = torch.ops.aten
_X, _W = Hole("x"), Hole("weight")
_MUL, _ADD = (aten.mul.Tensor,), (aten.add.Tensor,)
_VARIANCE = Call((aten.mean.dim,), (Call((aten.pow.Tensor_Scalar,), (_X, 2)), [-1], True))
_INVERSE = Call((aten.rsqrt.default,), (Call(_ADD, (_VARIANCE, Hole("eps"))),))
_NORMED = Call(_MUL, (_X, _INVERSE), swaps=True)
_PLAIN = Call(_MUL, (_W, _NORMED), swaps=True)  # Llama: weight · normed
_SHIFTED = Call(_MUL, (_NORMED, Call(_ADD, (_W, Hole("offset")))), swaps=True)  # Gemma: normed · (weight + 1)


def raise_layer_norm(program: Program) -> int:
    """aten.layer_norm over the last dimension with a weight → layer_norm."""
    count = 0
    for node in program.calls(aten.layer_norm.default):
        a = arguments(node)
        if not _is_vector(a["weight"]) or len(a["normalized_shape"]) != 1:
            continue
        node.target, node.kwargs = LAYER_NORM.target, {}
        node.args = (a["input"], a["weight"], a["bias"], a["eps"])
        count += 1
    return count


def raise_rms_norm(program: Program) -> int:
    """aten.rms_norm, or the arithmetic of one with its weight plain or stored minus one → rms_norm."""
    count = 0
    for node in program.calls(aten.mul.Tensor):
        found = match(_SHIFTED, node) or match(_PLAIN, node)
        if found is None or not _is_vector(found["weight"]) or not isinstance(found["eps"], float):
            continue
        rewrite(program, node, RMS_NORM, found["x"], found["weight"], found["eps"], float(found.get("offset", 0.0)))
        count += 1
    for node in program.calls(aten.rms_norm.default):
        a = arguments(node)
        if _is_vector(a["weight"]) and len(a["normalized_shape"]) == 1:
            eps = torch.finfo(torch.float32).eps if a["eps"] is None else a["eps"]
            node.target, node.args, node.kwargs = RMS_NORM.target, (a["input"], a["weight"], eps, 0.0), {}
            count += 1
    return count


def _is_vector(value: object) -> bool:
    """A stored weight of one dimension."""
    return isinstance(value, fx.Node) and value.op == "get_attr" and value.meta["val"].dim() == 1
