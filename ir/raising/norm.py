"""Normalisations, from their ATen call or from their arithmetic."""

from __future__ import annotations

import torch

from ..ops import LAYER_NORM, RMS_NORM
from ..program import Program
from .match import Call, Hole, match

aten = torch.ops.aten
_X, _W = Hole("x"), Hole("weight")
_MUL = (aten.mul.Tensor,)
_VARIANCE = Call((aten.mean.dim,), (Call((aten.pow.Tensor_Scalar,), (_X, 2)), [-1], True))
_NORMED = Call(_MUL, (_X, Call((aten.rsqrt.default,), (Call((aten.add.Tensor,), (_VARIANCE, Hole("eps"))),))), swaps=True)
_PLAIN = Call(_MUL, (_W, _NORMED), swaps=True)  # Llama: weight · normed
_SHIFTED = Call(_MUL, (_NORMED, Call((aten.add.Tensor,), (_W, Hole("offset")))), swaps=True)  # Gemma: normed · (w + 1)


def raise_layer_norm(program: Program) -> int:
    """aten.layer_norm over the last dimension with a weight → layer_norm."""
    count = 0
    for node in program.calls(aten.layer_norm.default):
        x, shape, *rest = node.args
        weight, bias, eps = (*rest, None, None, 1e-5)[:3] if len(rest) < 3 else rest[:3]
        if weight is None or len(shape) != 1:  # type: ignore[arg-type]
            continue
        node.target, node.args, node.kwargs = LAYER_NORM.target, (x, weight, bias, eps), {}
        count += 1
    return count


def raise_rms_norm(program: Program) -> int:
    """The arithmetic of a root-mean-square norm, weight plain or stored minus one → rms_norm."""
    count = 0
    for node in program.calls(aten.mul.Tensor):
        found = match(_SHIFTED, node) or match(_PLAIN, node)
        if found is None or getattr(found["weight"], "op", "") != "get_attr":
            continue
        offset = float(found.get("offset", 0.0))
        with program.graph.inserting_before(node):
            call = program.graph.call_function(RMS_NORM.target, (found["x"], found["weight"], found["eps"], offset))
        node.replace_all_uses_with(call)
        count += 1
    for call in program.calls(aten.rms_norm.default):
        x, shape, weight, *eps = call.args
        if weight is not None and len(shape) == 1 and eps and eps[0] is not None:  # type: ignore[arg-type]
            call.target, call.args = RMS_NORM.target, (x, weight, eps[0], 0.0)
            count += 1
    return count
