"""What each dialect op asks of the shapes of its arguments, beyond what its shape rule computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import sympy
from torch import fx

from .ops import (
    ACTIVATIONS,
    ATTENTION,
    CACHED_ATTENTION,
    EMBEDDING,
    EXPERTS,
    GATED,
    HADAMARD,
    HEAD,
    LAYER_NORM,
    LINEAR,
    RMS_NORM,
    ROTARY,
    arguments,
)

Shape: TypeAlias = tuple[Any, ...]
Arguments: TypeAlias = dict[str, Any]  # by name: shapes for tensors, the value for everything else


def faults(node: fx.Node) -> Iterator[str]:
    """Why a dialect node's arguments do not go together; needs derived shapes. Nothing for ATen nodes."""
    rule = _RULES.get(node.target)
    if rule is not None:
        given = arguments(node)
        yield from rule(
            {name: value.meta["shape"] if isinstance(value, fx.Node) else value for name, value in given.items()}
        )
        if unready := [n for n, v in given.items() if n in _INTEGERS.get(node.target, ()) and _floats(v)]:
            yield f"{unready[0]} must be integers"


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for every value of their symbols."""
    return bool(a == b or sympy.expand(sympy.sympify(a) - sympy.sympify(b)) == 0)


def same_shape(a: Shape, b: Shape) -> bool:
    """Whether two shapes are equal for every value of their symbols."""
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def shown(shape: Shape) -> str:
    """`[B, T, 256]`."""
    return f"[{', '.join(map(str, shape))}]"


def _floats(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.meta["dtype"].is_floating_point


def _linear(a: Arguments) -> Iterator[str]:
    x, weight, bias = a["x"], a["weight"], a["bias"]
    if not x or len(weight) != 2 or not same(x[-1], weight[1]):
        yield f"x {shown(x)} does not fit weight {shown(weight)}, which is [N, K] over a last dim of K"
    elif bias is not None and not same_shape(bias, weight[:1]):
        yield f"bias {shown(bias)} does not fit weight {shown(weight)}"


def _embedding(a: Arguments) -> Iterator[str]:
    if len(a["weight"]) != 2:
        yield f"weight {shown(a['weight'])} is not a table [V, K]"


def _gated(a: Arguments) -> Iterator[str]:
    if not same_shape(a["gate"], a["up"]):
        yield f"gate {shown(a['gate'])} and up {shown(a['up'])} differ"
    yield from _activation(a)


def _activation(a: Arguments) -> Iterator[str]:
    if a["act"] not in ACTIVATIONS:
        yield f"unknown activation '{a['act']}'; known: {', '.join(ACTIVATIONS)}"


def _experts(a: Arguments) -> Iterator[str]:
    x, gate_up, down = a["x"], a["gate_up"], a["down"]
    if [len(x), len(gate_up), len(down), len(a["chosen"])] != [2, 3, 3, 2]:
        yield "needs x [N, K], chosen [N, J], gate_up [E, 2 I, K] and down [E, K, I]"
        return
    count, twice, wide = gate_up
    if not same(x[1], wide) or not same_shape(down, (count, wide, sympy.sympify(twice) / 2)):
        given = f"x {shown(x)}, gate_up {shown(gate_up)} and down {shown(down)}"
        yield f"{given} do not fit: they are [N, K], [E, 2 I, K] and [E, K, I]"
    if not same_shape(a["chosen"], a["shares"]) or not same(a["chosen"][0], x[0]):
        yield f"chosen {shown(a['chosen'])} and shares {shown(a['shares'])} must both be [{x[0]}, J]"
    yield from _activation(a)


def _norm(a: Arguments) -> Iterator[str]:
    for name in ("weight", "bias"):
        if a.get(name) is not None and not same_shape(a[name], a["x"][-1:]):
            yield f"{name} {shown(a[name])} does not fit the last dim of x {shown(a['x'])}"


def _hadamard(a: Arguments) -> Iterator[str]:
    size = a["size"]
    if size < 1 or size & (size - 1) or not a["x"] or not same(sympy.sympify(a["x"][-1]) % size, 0):
        yield f"size {size} must be a power of two that divides the last dim of x {shown(a['x'])}"


def _rotary(a: Arguments) -> Iterator[str]:
    x, positions, table = a["x"], a["positions"], a["inv_freq"]
    if len(x) != 4 or not same_shape(positions, (x[0], x[2])):
        yield f"x {shown(x)} is [B, H, T, D] and needs positions [B, T], not {shown(positions)}"
    elif len(table) != 1 or sympy.sympify(2 * table[0] - x[3]).is_positive:
        yield f"inv_freq {shown(table)} turns pairs, but a head has {x[3]} dims"


def _attention(a: Arguments) -> Iterator[str]:
    query, key, value = a["query"], a["key"], a["value"]
    if [len(query), len(key), len(value)] != [4, 4, 4]:
        yield "query, key and value must be [B, heads, tokens, dim]"
        return
    both = f"query {shown(query)}, key {shown(key)}, value {shown(value)}"
    if not same(query[0], key[0]) or not same(query[3], key[3]):
        yield f"query and key differ in batch or dim: {both}"
    if not same_shape(key[:3], value[:3]):
        yield f"key and value differ in batch, heads or tokens: {both}"
    if not key[1] or sympy.sympify(query[1]) % key[1] != 0:
        yield f"{query[1]} query heads do not share {key[1]} kv heads evenly"
    if a["sinks"] is not None and not same_shape(a["sinks"], query[1:2]):
        yield f"sinks {shown(a['sinks'])} must be one for each of {query[1]} query heads"
    if a["window"] is not None and a["window"] < 1:
        yield f"a window of {a['window']} tokens sees nothing"


def _masked(a: Arguments) -> Iterator[str]:
    yield from _attention(a)
    mask, full = a["mask"], (*a["query"][:3], a["key"][2])
    if mask is None:
        return
    padding = len(mask) == 2
    expected = (full[0], full[3]) if padding else full[max(0, 4 - len(mask)) :]
    if len(mask) != len(expected) or any(
        not same(m, d) and (padding or not same(m, 1)) for m, d in zip(mask, expected, strict=True)
    ):
        yield f"mask {shown(mask)} does not fit logits {shown(full)}: it is [B, S], or broadcasts to [B, H, T, S]"


def _cached(a: Arguments) -> Iterator[str]:
    yield from _attention(a)
    if not same(a["query"][2], a["key"][2]):
        yield f"query {shown(a['query'])} and key {shown(a['key'])} must hold the same new tokens"


_RULES: dict[Any, Callable[[Arguments], Iterator[str]]] = {
    LINEAR.target: _linear,
    HEAD.target: _linear,
    EMBEDDING.target: _embedding,
    GATED.target: _gated,
    EXPERTS.target: _experts,
    HADAMARD.target: _hadamard,
    RMS_NORM.target: _norm,
    LAYER_NORM.target: _norm,
    ROTARY.target: _rotary,
    ATTENTION.target: _masked,
    CACHED_ATTENTION.target: _cached,
}
_INTEGERS: dict[Any, tuple[str, ...]] = {
    EMBEDDING.target: ("ids",),
    EXPERTS.target: ("chosen",),
    ROTARY.target: ("positions",),
}
