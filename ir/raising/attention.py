"""Attention written with torch's scaled_dot_product_attention, and masks that say nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..ops import ATTENTION, arguments
from ..program import Program
from .match import rewrite

aten = torch.ops.aten
_CASTS = {aten.to.dtype, aten._to_copy.default}


def raise_attention(program: Program) -> int:
    """aten.scaled_dot_product_attention over [B, H, T, D] without dropout → attention."""
    count = 0
    for node in program.calls(aten.scaled_dot_product_attention.default):
        a = arguments(node)
        query, key = a["query"].meta["val"], a["key"].meta["val"]
        if a["dropout_p"] or query.dim() != 4:
            continue
        # torch aligns the causal triangle at the first key, the dialect at the last: the same only for a square
        if a["is_causal"] and not statically_known_true(query.shape[2] == key.shape[2]):
            continue
        mask = None if a["attn_mask"] is None else of_rank_four(program, node, a["attn_mask"])
        scale = query.shape[-1] ** -0.5 if a["scale"] is None else a["scale"]
        operands = (a["query"], a["key"], a["value"], mask, None, float(scale), bool(a["is_causal"]))
        rewrite(program, node, ATTENTION, *operands, None, None)
        count += 1
    return count


def drop_full_masks(program: Program) -> int:
    """A padding mask that hides nothing, made of ones on the spot → none."""
    count = 0
    for node in program.calls(ATTENTION):
        a = arguments(node)
        source = a["mask"]
        while isinstance(source, fx.Node) and source.target in _CASTS:
            source = source.args[0]
        if isinstance(source, fx.Node) and source.target is aten.ones.default:
            a["mask"] = None
            node.args, node.kwargs = tuple(a[name] for name in ATTENTION.arguments), {}
            count += 1
    return count


def of_rank_four(program: Program, node: fx.Node, mask: Any) -> fx.Node:
    """A mask that broadcasts to [B, H, T, S], of any rank before; the dialect takes two dimensions for [B, S]."""
    value = mask.meta["val"]
    with program.graph.inserting_before(node):
        for _ in range(4 - value.dim()):
            mask, value = program.graph.call_function(aten.unsqueeze.default, (mask, 0)), value.unsqueeze(0)
            mask.meta["val"] = value
    result: fx.Node = mask
    return result
