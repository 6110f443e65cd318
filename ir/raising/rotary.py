"""Rotary embedding, from x · cos + rotate_half(x) · sin with angles made of positions and inverse frequencies."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import fx

from ..ops import ROTARY
from ..program import Program
from .match import Call, Hole, Maybe, match

aten = torch.ops.aten
_MUL, _X, _POSITIONS, _FREQ = (aten.mul.Tensor,), Hole("x"), Hole("positions"), Hole("inv_freq")
_END = sys.maxsize


def _unsqueeze(inner: Any, dim: int) -> Call:
    return Call((aten.unsqueeze.default,), (inner, dim))


_PAIR = (Hole("left"), Hole("right"))
_OUTER = Call((aten.transpose.int,), (Call((aten.matmul.default, aten.bmm.default), _PAIR), 1, 2))
_PRODUCT = Call(_MUL, _PAIR)  # the same product of a column and a row, as some torch versions trace it
_TWICE = Call((aten.cat.default,), ([Hole("half"), Hole("half")], -1))


def _wave(function: Any) -> Any:
    call = Call((function,), (Hole("angles"),))
    return _unsqueeze(Maybe(Call(_MUL, (call, Hole("scale"))), call), 1)


_HALF = Call(
    (aten.cat.default,),
    (
        [
            Call((aten.neg.default,), (Call((aten.slice.Tensor,), (_X, 3, Hole("r"), _END)),)),
            Call((aten.slice.Tensor,), (_X, 3, 0, Hole("r"))),
        ],
        -1,
    ),
)
_ROTATED = Call(
    (aten.add.Tensor,),
    (
        Call(_MUL, (_X, _wave(aten.cos.default)), swaps=True),
        Call(_MUL, (_HALF, _wave(aten.sin.default)), swaps=True),
    ),
    swaps=True,
)
_PASSED = Call((aten.cat.default,), ([Hole("rotated"), Call((aten.slice.Tensor,), (Hole("whole"), 3, Hole("from"), _END))], -1))


def raise_rotary(program: Program) -> int:
    """Each rotated tensor → rotary(x, positions, inv_freq, scale); partial rotation absorbs its slice and cat."""
    count = 0
    for node in program.calls(aten.add.Tensor):
        found = match(_ROTATED, node)
        angles = None if found is None else _angles(found["angles"])
        if found is None or angles is None:
            continue
        positions, inv_freq = angles
        with program.graph.inserting_before(node):
            scale = float(found.get("scale", 1.0))
            call = program.graph.call_function(ROTARY.target, (found["x"], positions, inv_freq, scale))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        count += 1
    _absorb_passed(program)
    return count


def _angles(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """(positions, inv_freq) of cat(f, f) with f = (inv_freq ⊗ positions)ᵀ."""
    twice = match(_TWICE, node)
    half = twice["half"] if twice is not None else None
    product = match(_OUTER, half) or match(_PRODUCT, half)
    if product is None:
        return None
    for a, b in ((product["left"], product["right"]), (product["right"], product["left"])):
        inv_freq, positions = _source(a, "get_attr"), _source(b, "placeholder")
        if inv_freq is not None and positions is not None:
            return positions, inv_freq
    return None


_SHAPING = {aten.unsqueeze.default, aten.expand.default, aten.slice.Tensor, aten.to.dtype, aten._to_copy.default}
_SHAPING |= {aten.to.dtype_layout, aten.to.device, aten.view.default}


def _source(node: Any, kind: str) -> fx.Node | None:
    """The weight or input at the end of a chain of views and casts."""
    while isinstance(node, fx.Node) and node.target in _SHAPING:
        node = node.args[0]
    return node if isinstance(node, fx.Node) and node.op == kind else None


def _absorb_passed(program: Program) -> None:
    for node in program.calls(aten.cat.default):
        found = match(_PASSED, node)
        if found is None or getattr(found["rotated"], "target", None) is not ROTARY.target:
            continue
        rotated, whole, start = found["rotated"], found["whole"], found["from"]
        x = rotated.args[0]
        part = match(Call((aten.slice.Tensor,), (Hole("whole"), 3, 0, start)), x)
        if x is whole or (part is not None and part["whole"] is whole):
            with program.graph.inserting_before(node):
                call = program.graph.call_function(ROTARY.target, (whole, *rotated.args[1:]))
            node.replace_all_uses_with(call)
