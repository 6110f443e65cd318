"""Ops that exporters write out in arithmetic: reciprocal roots, SiLU, GELU's error function, layer normalisation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ..ops import LAYER_NORM
from ..program import Program
from .match import Call, Hole, match, rewrite

aten = torch.ops.aten
_X = Hole("x")
_MUL, _ADD, _DIV, _SUB = (aten.mul.Tensor,), (aten.add.Tensor,), (aten.div.Tensor,), (aten.sub.Tensor,)


def _mul(a: Any, b: Any) -> Call:
    return Call(_MUL, (a, b), swaps=True)


def _mean(x: Any) -> Call:
    return Call((aten.mean.dim,), (x, [-1], True))


_ROOT = Call((aten.sqrt.default,), (_X,))
_SILU = _mul(_X, Call((aten.sigmoid.default,), (_X,)))
_ERF = Call((aten.erf.default,), (Hole("scaled"),))
_GATE = Call(_ADD, (_ERF, 1.0), swaps=True)  # 1 + erf(x / √2)
_GELUS = (_mul(_mul(_X, _GATE), Hole("half")), _mul(_mul(_X, Hole("half")), _GATE), _mul(_X, _mul(_GATE, Hole("half"))))
_SCALED = (_mul(_X, Hole("by")), Call(_DIV, (_X, Hole("over"))))
_CENTRED = Call(_SUB, (_X, _mean(_X)))
_DEVIATION = Call((aten.sqrt.default,), (Call(_ADD, (_mean(Hole("squared")), Hole("eps")), swaps=True),))
_STANDARD = Call(_DIV, (Hole("centred"), _DEVIATION))
_SHIFTED = Call(_ADD, (_mul(_STANDARD, Hole("weight")), Hole("bias")), swaps=True)


def raise_roots(program: Program) -> int:
    """reciprocal(sqrt(x)) and x / sqrt(mean + ε) → rsqrt; x · x → pow(x, 2) under a mean."""
    count = 0
    for node in program.calls(aten.reciprocal.default, aten.div.Tensor):
        under = node.args[-1]
        found = match(_ROOT, under)
        if found is None or (node.target is aten.div.Tensor and not _is_shifted_mean(found["x"])):
            continue
        if node.target is aten.reciprocal.default:
            node.target, node.args = aten.rsqrt.default, (found["x"],)
            count += 1
        elif isinstance(node.args[0], fx.Node) and not _is_centred(node.args[0]):
            with program.graph.inserting_before(node):
                root = program.graph.call_function(aten.rsqrt.default, (found["x"],))
            root.meta["val"] = under.meta["val"]  # type: ignore[union-attr]  # a match is a node
            node.target, node.args = aten.mul.Tensor, (node.args[0], root)
            count += 1
    for node in program.calls(aten.mul.Tensor):
        if node.args[0] is node.args[1] and any(user.target is aten.mean.dim for user in node.users):
            node.target, node.args = aten.pow.Tensor_Scalar, (node.args[0], 2)
    return count


def raise_written_activations(program: Program) -> int:
    """x · sigmoid(x) → silu; ½ x (1 + erf(x / √2)) → gelu."""
    count = 0
    for node in program.calls(aten.mul.Tensor):
        found = match(_SILU, node)
        if found is not None:
            node.target, node.args, node.kwargs = aten.silu.default, (found["x"],), {}
            count += 1
            continue
        found = next(filter(None, (match(pattern, node) for pattern in _GELUS)), None)
        if found is not None and _is_about(found["half"], 0.5) and _is_root_of_half(found["scaled"], found["x"]):
            node.target, node.args, node.kwargs = aten.gelu.default, (found["x"],), {}
            count += 1
    return count


def raise_written_layer_norm(program: Program) -> int:
    """(x - mean) / sqrt(mean((x - mean)²) + ε) · weight + bias → layer_norm."""
    count = 0
    for node in program.calls(aten.add.Tensor):
        found = match(_SHIFTED, node)
        if found is None or not isinstance(found["eps"], float):
            continue
        centred = match(_CENTRED, found["centred"])
        squared = match(Call((aten.pow.Tensor_Scalar,), (Hole("base"), Hole("two"))), found["squared"])
        if centred is None or squared is None or squared["two"] != 2 or not _same(squared["base"], found["centred"]):
            continue
        if all(isinstance(v, fx.Node) and v.op == "get_attr" for v in (found["weight"], found["bias"])):
            rewrite(program, node, LAYER_NORM, centred["x"], found["weight"], found["bias"], found["eps"])
            count += 1
    return count


def _same(a: Any, b: Any) -> bool:
    """One node, or two that compute the same difference."""
    return a is b or (isinstance(a, fx.Node) and isinstance(b, fx.Node) and (a.target, a.args) == (b.target, b.args))


def _is_shifted_mean(value: Any) -> bool:
    found = match(Call(_ADD, (Hole("mean"), Hole("eps")), swaps=True), value)
    return found is not None and any(getattr(v, "target", None) is aten.mean.dim for v in found.values())


def _is_centred(value: fx.Node) -> bool:
    return value.target is aten.sub.Tensor


def _is_about(value: Any, meant: float) -> bool:
    return isinstance(value, int | float) and math.isclose(value, meant, rel_tol=1e-6)


def _is_root_of_half(value: Any, x: Any) -> bool:
    """x / √2."""
    for pattern in _SCALED:
        found = match(pattern, value, {"x": x})
        if found is not None:
            return _is_about(found.get("by", 0), math.sqrt(0.5)) or _is_about(found.get("over", 0), math.sqrt(2))
    return False
