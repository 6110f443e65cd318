"""Rotary embedding, from x · cos + rotate_half(x) · sin with angles made of positions and inverse frequencies."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import fx

from ..ops import ROTARY
from ..program import Program
from .match import Call, Hole, match, rewrite

aten = torch.ops.aten
_MUL, _X = (aten.mul.Tensor,), Hole("x")
_END = sys.maxsize

_PAIR = (Hole("left"), Hole("right"))
_OUTER = Call((aten.transpose.int,), (Call((aten.matmul.default, aten.bmm.default), _PAIR), 1, 2))
_PRODUCT = Call(_MUL, _PAIR)  # the same product of a column and a row, as some torch versions trace it
_TWICE = Call((aten.cat.default,), ([Hole("half"), Hole("half")], -1))


def _slice(source: Any, start: Any, end: Any) -> Call:
    return Call((aten.slice.Tensor,), (source, 3, start, end))


_TURNED = Call(
    (aten.cat.default,), ([Call((aten.neg.default,), (_slice(_X, Hole("r"), _END),)), _slice(_X, 0, Hole("r"))], -1)
)


def _rotated(scaled: bool) -> Call:
    def wave(function: Any) -> Call:
        call = Call((function,), (Hole("angles"),))
        return Call((aten.unsqueeze.default,), (Call(_MUL, (call, Hole("scale"))) if scaled else call, 1))

    straight = Call(_MUL, (_X, wave(aten.cos.default)), swaps=True)
    turned = Call(_MUL, (_TURNED, wave(aten.sin.default)), swaps=True)
    return Call((aten.add.Tensor,), (straight, turned), swaps=True)


_ROTATED = (_rotated(scaled=True), _rotated(scaled=False))
_PASSED = Call((aten.cat.default,), ([Hole("rotated"), _slice(Hole("whole"), Hole("from"), _END)], -1))


def raise_rotary(program: Program) -> int:
    """Each rotated tensor → rotary(x, positions, inv_freq, scale); partial rotation absorbs its slice and cat."""
    count = 0
    for node in program.calls(aten.add.Tensor):
        found = next(filter(None, (match(pattern, node) for pattern in _ROTATED)), None)
        angles = None if found is None else _angles(found["angles"])
        if found is None or angles is None or angles[1].meta["val"].shape != (found["r"],):
            continue
        scale = found.get("scale", 1.0)
        if isinstance(scale, float):
            rewrite(program, node, ROTARY, found["x"], *angles, scale)
            count += 1
    _absorb_passed(program)
    return count


def _angles(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """(positions, inv_freq) of cat(f, f) with f = (inv_freq ⊗ positions)ᵀ."""
    twice = match(_TWICE, node)
    return None if twice is None else angles_of(twice["half"])


def angles_of(half: Any) -> tuple[fx.Node, fx.Node] | None:
    """(positions, inv_freq) of (inv_freq ⊗ positions)ᵀ."""
    product = match(_OUTER, half) or match(_PRODUCT, half)
    if product is None:
        return None
    for a, b in ((product["left"], product["right"]), (product["right"], product["left"])):
        inv_freq, positions = _source(a, "get_attr"), _source(b, "placeholder")
        if inv_freq is not None and positions is not None:
            return positions, inv_freq
    return None


_CASTS = {aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.unsqueeze.default, aten.expand.default}
_WHOLE = Call((aten.slice.Tensor,), (Hole("source"), Hole("dim"), 0, _END))  # as `x[:, None]` leaves it behind


def _source(node: Any, kind: str) -> fx.Node | None:
    """The weight or input at the end of a chain of casts and of views that drop nothing."""
    while isinstance(node, fx.Node) and (node.target in _CASTS or match(_WHOLE, node) is not None):
        node = node.args[0]
    return node if isinstance(node, fx.Node) and node.op == kind else None


def _absorb_passed(program: Program) -> None:
    for node in program.calls(aten.cat.default):
        found = match(_PASSED, node)
        if found is None or getattr(found["rotated"], "target", None) is not ROTARY.target:
            continue
        rotated, whole, start = found["rotated"], found["whole"], found["from"]
        is_all = rotated.args[0] is whole and start == whole.meta["val"].shape[-1]
        if is_all or match(_slice(whole, 0, start), rotated.args[0]) is not None:
            rewrite(program, node, ROTARY, whole, *rotated.args[1:])
