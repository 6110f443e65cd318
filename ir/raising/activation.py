"""Activations: the arithmetic of GELU's tanh form, and gated MLPs."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from ..ops import GATED, LINEAR
from ..program import Program
from .match import Call, Hole, match, rewrite

aten = torch.ops.aten
_MUL, _ADD, _X = (aten.mul.Tensor,), (aten.add.Tensor,), Hole("x")


def _mul(a: Any, b: Any) -> Call:
    return Call(_MUL, (a, b), swaps=True)


def _one_plus_tanh(inner: Any) -> Call:
    return Call(_ADD, (Call((aten.tanh.default,), (inner,)), 1.0), swaps=True)


_CUBE = Call((aten.pow.Tensor_Scalar,), (_X, Hole("three")))
_HALF, _SLOPE, _CUBIC = Hole("half"), Hole("slope"), Hole("cubic")
_GELU_NEW = _mul(  # ½ x (1 + tanh(√(2/π) (x + 0.044715 x³)))
    _mul(_X, _HALF),
    _one_plus_tanh(_mul(Call(_ADD, (_X, _mul(_CUBE, _CUBIC)), swaps=True), _SLOPE)),
)
_GELU_FAST = _mul(  # the same with x factored out
    _mul(_X, _HALF),
    _one_plus_tanh(
        _mul(_mul(_X, _SLOPE), Call(_ADD, (_mul(_mul(_X, _CUBIC), _X), 1.0), swaps=True)),
    ),
)
_MEANT = {"half": 0.5, "slope": math.sqrt(2 / math.pi), "cubic": 0.044715, "three": 3.0}
_ACTS = {aten.silu.default: "silu", aten.relu.default: "relu", aten.gelu.default: "gelu"}
_SHAPING = {
    operator.getitem,
    aten.chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.slice.Tensor,
    aten.view.default,
    aten.reshape.default,
}


def raise_gelu(program: Program) -> int:
    """The tanh form of GELU written out → aten.gelu(x, approximate="tanh")."""
    count = 0
    for node in program.calls(aten.mul.Tensor):
        found = match(_GELU_NEW, node) or match(_GELU_FAST, node)
        if found is None or not all(_is_about(found[name], v) for name, v in _MEANT.items() if name in found):
            continue
        node.target, node.args, node.kwargs = aten.gelu.default, (found["x"],), {"approximate": "tanh"}
        count += 1
    return count


def raise_gated(program: Program) -> int:
    """act(gate) · up → gated, where `up` comes out of a matrix product."""
    count = 0
    for node in program.calls(aten.mul.Tensor):
        left, right = node.args
        for acted, up in ((left, right), (right, left)):
            act = _activation(acted)
            if act is None or _activation(up) is not None or not _is_projected(up):
                continue
            gate: Any = acted.args[0]  # type: ignore[union-attr]  # an activation is a node
            if tuple(gate.meta["val"].shape) == tuple(up.meta["val"].shape):  # type: ignore[union-attr]  # so is this
                rewrite(program, node, GATED, gate, up, act)
                count += 1
                break
    return count


def _is_about(value: Any, meant: float) -> bool:
    return isinstance(value, int | float) and math.isclose(value, meant, rel_tol=1e-7)


def _activation(value: object) -> str | None:
    if not isinstance(value, fx.Node) or value.target not in _ACTS:
        return None
    tanh = value.kwargs.get("approximate") == "tanh" or "tanh" in value.args[1:]
    return "gelu_tanh" if tanh else _ACTS[value.target]


def _is_projected(value: Any) -> bool:
    """Comes out of a linear, at most split or reshaped."""
    while isinstance(value, fx.Node) and value.target in _SHAPING:
        value = value.args[0]
    return isinstance(value, fx.Node) and value.target is LINEAR.target
