"""Attention without and with a cache; ONNX's Attention where it says the same, its parts where it does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from ...ir.cache import Site
from ...ir.program import Program
from . import state
from .builder import Builder, Operand, Value, onnx_type
from .codes import FLOAT
from .forms import Given, Made, form
from .pages import read_and_store
from .sizes import shape, size_of

LOWEST = float(torch.finfo(torch.float32).min)


@form("smelt.attention")
def attention(b: Builder, node: fx.Node, a: Given) -> Made:
    """Attention of tensors; a causal one whose queries are the last of the keys."""
    query, key, value, mask = (a[name] for name in ("query", "key", "value", "mask"))
    simple = a["causal"] and a["window"] is None and mask is None and query.shape[2] == key.shape[2]
    seen = added = None
    if a["causal"] and (not simple or a["sinks"] is not None):
        seen, simple = _causal(b, query, key, a["window"]), False
    if mask is not None:
        added = _added(b, mask)
        if len(mask.shape) == 2 or mask.shape[-2] == 1:  # onnxruntime 1.31 wants a row for each query
            rows = shape(b, [1, 1, size_of(b, query, 2), 1])
            added = b.op("Expand", added, rows)
        added = added if seen is None else b.op("Where", seen, added, b.const(-np.inf))
    mixed = added if added is not None else seen
    return attended(b, node, a, query, key, value, mixed, added is not None, simple)


@form("smelt.cached_attention")
def cached_attention(b: Builder, node: fx.Node, a: Given) -> Made:
    """Attention over a site of the cache and the step's new tokens; without inputs of the past, over the latter."""
    program: Program = b.shared["program"]
    if "step" not in b.shared:
        return attention(b, node, {**a, "mask": None, "causal": True})
    assert program.cache is not None
    site = program.cache[a["layer"]]
    step, window = b.shared["step"], a["window"]
    places: str | None
    if site.tail is None:
        keys, values, ranks, limit, places = _dense(b, site, a["key"], a["value"])
    else:
        keys, values, ranks, limit, places = read_and_store(b, site, a["key"], a["value"])
    seen = b.op("LessOrEqual", b.op("Unsqueeze", ranks, b.const([1, 2])), limit)  # [B, 1, T, S]
    if window is not None:
        at = b.op("Unsqueeze", step["positions"], b.const([1, 3]))
        near = b.op("Less", b.op("Sub", at, places), b.const(int(window)))
        seen = b.op("And", seen, near)
    return attended(b, node, a, a["query"], keys, values, seen)


def _dense(b: Builder, site: Site, key: Value, value: Value) -> tuple[str, str, str, str, str]:
    """A site without tail: new tokens are scattered behind each row's length; what some row uses is read."""
    step, kind = b.shared["step"], onnx_type(getattr(torch, site.dense))
    most = b.once("most", lambda: _most(b))
    read = []
    for name, new in zip(state.buffers(b, site), (key, value), strict=True):
        dtype, dims = state.buffers(b, site)[name]
        fresh = b.name_of(new) if kind == FLOAT else b.op("Cast", new, to=kind)
        whole = b.op("TensorScatter", f"past.{name}", fresh, step["lengths"], axis=2, mode="linear")
        b.shared["present"][name] = (whole, onnx_type(dtype), dims)
        used = b.op("Slice", whole, b.const([0]), most, b.const([2]))
        read.append(used if kind == FLOAT else b.op("Cast", used, to=FLOAT))
    slots = b.op(
        "Unsqueeze", b.op("Range", b.const(np.array(0)), b.op("Squeeze", most), b.const(np.array(1))), b.const([0])
    )
    limit = b.op(
        "Unsqueeze", b.op("Add", b.op("Unsqueeze", step["lengths"], b.const([1])), step["new"]), b.const([1, 3])
    )
    return read[0], read[1], slots, limit, b.op("Unsqueeze", slots, b.const([1, 2]))


def _most(b: Builder) -> Any:
    """Slots up to the last new token of the longest row, [1]."""
    longest = b.op("ReduceMax", b.shared["step"]["lengths"], keepdims=1)
    return b.op("Add", longest, size_of(b, b.shared["step"]["tokens"], 1))


def _causal(b: Builder, query: Value, key: Value, window: int | None) -> Any:
    """bool [1, 1, T, S]: a query sees the keys up to its own, the last `window` of them."""
    rows, columns = size_of(b, query, 2), size_of(b, key, 2)
    apart = b.op("Sub", _line(b, b.op("Sub", columns, rows), columns, [0, 1, 3]), _line(b, None, columns, [0, 1, 2]))
    seen = b.op("GreaterOrEqual", apart, b.const(0))
    return seen if window is None else b.op("And", seen, b.op("Less", apart, b.const(int(window))))


def _line(b: Builder, start: Any, end: Any, axes: list[int]) -> Any:
    """start … end - 1 along one of four dims."""
    first = b.const(np.array(0)) if start is None else b.op("Squeeze", start)
    return b.op("Unsqueeze", b.op("Range", first, b.op("Squeeze", end), b.const(np.array(1))), b.const(axes))


def _added(b: Builder, mask: Value) -> Any:
    """A mask as an additive one that broadcasts to [B, H, T, S].

    What is not seen gets the least float32, as in the op's reference: a query that sees nothing takes the mean.
    """
    assert mask.shape is not None
    if mask.dtype.is_floating_point:
        return b.name_of(mask)
    seen: Operand = mask if mask.dtype == torch.bool else b.op("Cast", mask, to=onnx_type(torch.bool))
    if len(mask.shape) == 2:
        seen = b.op("Unsqueeze", seen, b.const([1, 2]))
    return b.op("Where", seen, b.const(0.0), b.const(LOWEST))


def attended(
    b: Builder,
    node: fx.Node,
    a: Given,
    q: Operand,
    k: Operand,
    v: Operand,
    mask: Any,
    additive: bool = False,
    causal: bool = False,
) -> str:
    """softmax(scale · q kᵀ) v under a mask; an additive one is added, of another is seen what is true."""
    if a["sinks"] is None:
        cap = a["softcap"]
        options: Any = {
            "scale": float(a["scale"]),
            "is_causal": int(causal),
            "softcap": None if cap is None else float(cap),
        }
        return str(b.op("Attention", q, k, v, mask, **options))
    return _with_sinks(b, node, a, q, k, v, mask if additive else b.op("Where", mask, b.const(0.0), b.const(-np.inf)))


def _with_sinks(b: Builder, node: fx.Node, a: Given, q: Operand, k: Operand, v: Operand, mask: Any) -> str:
    """Attention by its parts, with a logit a head that takes part in the softmax and carries no value."""
    heads, groups = int(node.meta["shape"][1]), int(a["key"].shape[1])
    if groups != heads:
        k, v = (_repeated(b, x, heads, groups, int(a[role].shape[3])) for x, role in ((k, "key"), (v, "value")))
    logits = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2]))
    logits = b.op("Mul", logits, b.const(float(a["scale"])))
    if a["softcap"] is not None:
        cap = b.const(float(a["softcap"]))
        logits = b.op("Mul", b.op("Tanh", b.op("Div", logits, cap)), cap)
    logits = logits if mask is None else b.op("Add", logits, mask)
    sinks = b.op("Unsqueeze", a["sinks"], b.const([0, 2, 3]))  # [1, H, 1, 1]
    first = b.op("Slice", logits, b.const([0]), b.const([1]), b.const([3]))  # [B, H, T, 1], for its shape
    extra = b.op("Expand", sinks, b.op("Shape", first))
    shares = b.op("Softmax", b.op("Concat", logits, extra, axis=3), axis=3)
    shares = b.op("Slice", shares, b.const([0]), b.const([-1]), b.const([3]))
    return str(b.op("MatMul", shares, v))


def _repeated(b: Builder, x: Operand, heads: int, groups: int, dim: int) -> str:
    """[B, G, S, D] as [B, H, S, D], every head of a group beside the others."""
    wide = b.op("Expand", b.op("Unsqueeze", x, b.const([2])), b.const([1, 1, heads // groups, 1, 1]))
    return str(b.op("Reshape", wide, b.const([0, heads, -1, dim])))
