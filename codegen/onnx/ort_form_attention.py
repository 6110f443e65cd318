"""Attention over the cache as one GroupQueryAttention: heads stay packed in rows, and it turns positions itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from ...ir.ops import CACHED_ATTENTION, ROTARY, arguments, is_op
from ...ir.program import Program
from .builder import Builder, Value
from .forms import Given, Made, form, standard
from .ort_form_linear import together

_VIEWS = ("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default")
_SAME = ("aten.contiguous.default", "aten.clone.default", "aten.alias.default")


@dataclass(frozen=True)
class Heads:
    """Where `[B, heads, T, D]` comes from: a node `[B, T, heads · D]`, or one of heads that must be turned back."""

    source: fx.Node
    flat: bool
    rotary: fx.Node | None


@form("smelt.cached_attention", style="ort")
def cached_attention(b: Builder, node: fx.Node, a: Given) -> str:
    """GroupQueryAttention, which appends to the cache; the result [B, T, H · D] is turned for what wants heads."""
    program: Program = b.shared["program"]
    assert program.cache is not None
    site = program.cache[a["layer"]]
    at = [s.layer for s in program.cache.sites].index(site.layer)
    q, k, v = (node.args[i] for i in range(3))
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)
    found = [_heads(b, x, turned) for x, turned in ((q, True), (k, True), (v, False))]
    tables = _tables(b, found[0].rotary, found[1].rotary)
    if tables is None:
        found = [_heads(b, x, False) for x in (q, k, v)]
    packed = together(b, [heads.source for heads in found]) if all(heads.flat for heads in found) else None
    rows = (packed, None, None) if packed else tuple(_flat(b, heads) for heads in found)
    cos, sin = tables or (None, None)
    operands = (
        *(b.name_of(row) for row in rows),
        *(f"past_key_values.{at}.{kind}" for kind in ("key", "value")),
        *(b.shared["style"].lengths(b)),
        *(b.name_of(table) for table in (cos, sin)),
        *("", "", b.name_of(a["sinks"])),
    )
    outputs = (b.fresh(f"{node.name}/GroupQueryAttention"), f"present.{at}.key", f"present.{at}.value")
    b.shared["style"].node(
        b,
        "GroupQueryAttention",
        operands,
        outputs,
        num_heads=site.heads,
        kv_num_heads=site.kv_heads,
        scale=a["scale"],
        local_window_size=a["window"] or -1,
        softcap=a["softcap"] or 0.0,
        do_rotary=int(tables is not None),
        rotary_interleaved=0,
    )
    b.shared["flat", node] = outputs[0]
    apart = b.op("Reshape", outputs[0], b.const([0, 0, site.heads, site.value_dim]))
    return str(b.op("Transpose", apart, perm=[0, 2, 1, 3]))


@form(*_VIEWS, style="ort")
def view(b: Builder, node: fx.Node, a: Given) -> Made:
    """The heads of an attention side by side are what it made; any other view is the standard one."""
    turned = _through(node.args[0])
    heads = _through(turned.args[0]) if _is_turn(turned) else turned
    shape = node.meta["shape"]
    if is_op(heads, CACHED_ATTENTION) and heads is not turned and len(shape) == 3:
        _, count, _, dim = heads.meta["shape"]
        if shape[-1] == count * dim:
            return str(b.shared["flat", heads])
    return standard(node)(b, node, a)


def _heads(b: Builder, node: fx.Node, turned: bool) -> Heads:
    """Looks through rotary positions (if `turned`) and the turn to `[B, heads, T, D]`."""
    rotary = None
    if turned and is_op(node, ROTARY):
        rotary, node = node, node.all_input_nodes[0]
    below = _through(node)
    if not _is_turn(below):
        return Heads(node, False, rotary)
    apart = _through(below.args[0])
    source = _through(apart.args[0]) if str(apart.target) in _VIEWS else None
    _, _, count, dim = apart.meta["shape"]
    if source is not None and len(source.meta["shape"]) == 3 and source.meta["shape"][-1] == count * dim:
        return Heads(source, True, rotary)
    return Heads(node, False, rotary)


def _flat(b: Builder, heads: Heads) -> Value | str:
    """`[B, T, heads · D]`."""
    value: Value = b.shared["values"][heads.source]
    if heads.flat:
        return value
    assert value.shape is not None
    turned = b.op("Transpose", value, perm=[0, 2, 1, 3])
    return str(b.op("Reshape", turned, b.const([0, 0, int(value.shape[1]) * int(value.shape[3])])))


def _tables(b: Builder, query: fx.Node | None, key: fx.Node | None) -> tuple[str, str] | None:
    """Cosines and sines `[context, R]` if the operator turns queries and keys as the Program does, else None.

    It counts positions from the cache's length, turns both alike, and wants R and D in eights.
    """
    if query is None or key is None:
        return None
    q, k = arguments(query), arguments(key)
    table, positions = q["inv_freq"], q["positions"]
    alike = all(q[name] is k[name] for name in ("inv_freq", "positions")) and q["scale"] == k["scale"]
    if not alike or table.op != "get_attr" or positions.op != "placeholder":
        return None
    program: Program = b.shared["program"]
    frequencies = program.weights[str(table.target)].dense(torch.float32)
    if frequencies.shape[0] % 8 or query.meta["shape"][-1] % 8:
        return None

    def make() -> tuple[str, str]:
        angle = torch.arange(int(program.facts["context"])).float()[:, None] * frequencies
        values = {"cos": torch.cos(angle) * q["scale"], "sin": torch.sin(angle) * q["scale"]}
        names = [b.array(f"{table.target}.{name}", value.numpy().astype(np.float32)) for name, value in values.items()]
        return names[0], names[1]

    made: tuple[str, str] = b.once(("angles", str(table.target), q["scale"]), make)
    return made


def _through(node: object) -> fx.Node:
    """What a node is a copy of."""
    assert isinstance(node, fx.Node)
    while str(node.target) in _SAME:
        node = node.all_input_nodes[0]
    return node


def _is_turn(node: fx.Node) -> bool:
    """Whether it swaps dims 1 and 2 of four."""
    name, dims = str(node.target), node.args[1:]
    if name == "aten.transpose.int":
        return len(node.meta["shape"]) == 4 and {dim % 4 for dim in dims if isinstance(dim, int)} == {1, 2}
    order = dims[0] if name == "aten.permute.default" else None
    return isinstance(order, list | tuple) and [dim % 4 for dim in order if isinstance(dim, int)] == [0, 2, 1, 3]
