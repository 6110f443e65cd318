"""Gated MLPs, attention written with scaled_dot_product_attention, and the vocabulary head."""

from __future__ import annotations

import torch
from torch import fx

from ..ops import ATTENTION, GATED, HEAD, LINEAR
from ..program import Program

aten = torch.ops.aten
_ACTS = {aten.silu.default: "silu", aten.relu.default: "relu", aten.gelu.default: "gelu"}
_POINTWISE = {aten.div.Tensor, aten.tanh.default, aten.mul.Tensor, aten.to.dtype, aten._to_copy.default}


def raise_gated(program: Program) -> int:
    """act(gate) · up → gated, where both come out of matrix products."""
    count = 0
    for node in program.calls(aten.mul.Tensor):
        left, right = node.args
        for acted, up in ((left, right), (right, left)):
            act = _activation(acted)
            if act is None or not isinstance(up, fx.Node) or _activation(up) is not None or not _is_wide(up):
                continue
            assert isinstance(acted, fx.Node)
            node.target, node.args = GATED.target, (acted.args[0], up, act)
            count += 1
            break
    return count


def _activation(value: object) -> str | None:
    if not isinstance(value, fx.Node) or value.target not in _ACTS:
        return None
    tanh = value.kwargs.get("approximate") == "tanh" or "tanh" in value.args[1:]
    return "gelu_tanh" if tanh else _ACTS[value.target]


def _is_wide(value: fx.Node) -> bool:
    """Comes out of a linear, possibly through a split: a scalar or a broadcast gate is no gated MLP."""
    while value.op == "call_function" and value.target not in (LINEAR.target,):
        if not value.args or not isinstance(value.args[0], fx.Node):
            return False
        value = value.args[0]
    return value.target is LINEAR.target


def raise_attention(program: Program) -> int:
    """aten.scaled_dot_product_attention without dropout → attention."""
    count = 0
    for node in program.calls(aten.scaled_dot_product_attention.default):
        q, k, v, mask, dropout, causal = (*node.args, None, 0.0, False)[:6] if len(node.args) < 6 else node.args[:6]
        if len(node.args) == 4:
            mask, dropout, causal = node.args[3], 0.0, False
        causal = node.kwargs.get("is_causal", causal)
        mask = node.kwargs.get("attn_mask", mask)
        dropout = node.kwargs.get("dropout_p", dropout)
        scale = node.kwargs.get("scale")
        if dropout:
            continue
        dim = q.meta["val"].shape[-1]  # type: ignore[union-attr]
        scale = float(dim) ** -0.5 if scale is None else scale
        with program.graph.inserting_before(node):
            call = program.graph.call_function(ATTENTION.target, (q, k, v, mask, None, scale, bool(causal)))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
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
