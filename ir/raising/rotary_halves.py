"""Rotary embedding written by halves, [a·cos - b·sin, b·cos + a·sin], its waves computed or looked up in tables."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ..ops import EMBEDDING, ROTARY
from ..program import Program
from ..weight import Weight
from .match import Call, Hole, match, rewrite
from .rotary import angles_of

aten = torch.ops.aten
_MUL = (aten.mul.Tensor,)
_A, _B = Hole("a"), Hole("b")


def _wave(name: str) -> Call:
    return Call((aten.unsqueeze.default,), (Hole(name), 1))


_FIRST = Call(
    (aten.sub.Tensor,), (Call(_MUL, (_A, _wave("cos")), swaps=True), Call(_MUL, (_B, _wave("sin")), swaps=True))
)
_SECOND = Call(
    (aten.add.Tensor,),
    (Call(_MUL, (_B, _wave("cos")), swaps=True), Call(_MUL, (_A, _wave("sin")), swaps=True)),
    swaps=True,
)


def raise_rotary_halves(program: Program) -> int:
    """cat of both rotated halves, and of what is passed behind them → rotary(x, positions, inv_freq, scale)."""
    count, scales = 0, dict[str, float]()
    for node in program.calls(aten.cat.default):
        parts: Any = node.args[0]
        found = match(_FIRST, parts[0]) if len(parts) in (2, 3) and node.args[1:] in ((-1,), (3,)) else None
        found = None if found is None else match(_SECOND, parts[1], found)
        if found is None or found["a"].target is not aten.slice.Tensor:
            continue
        x, r = found["a"].args[0], found["a"].meta["val"].shape[-1]
        width = x.meta["val"].shape[-1]
        pieces = [(found["a"], 0, r), (found["b"], r, 2 * r)] + [(p, 2 * r, width) for p in parts[2:]]
        if x.meta["val"].dim() != 4 or not all(_is_piece(p, x, s, e, width) for p, s, e in pieces):
            continue
        waves = _waves(program, node, found["cos"], found["sin"], scales)
        if waves is not None and waves[1].meta["val"].shape == (r,):
            rewrite(program, node, ROTARY, x, *waves)
            count += 1
    return count


def _is_piece(node: Any, x: fx.Node, start: int, end: int, width: int) -> bool:
    """node is x[..., start:end]."""
    if not isinstance(node, fx.Node) or node.target is not aten.slice.Tensor or node.args[0] is not x:
        return False
    _, dim, first, last, *step = node.args
    return isinstance(last, int) and (dim, first, min(last, width)) in ((3, start, end), (-1, start, end)) and not step


def _waves(
    program: Program, before: fx.Node, cos: Any, sin: Any, scales: dict[str, float]
) -> tuple[fx.Node, fx.Node, float] | None:
    """(positions, inv_freq, scale) of a cosine and a sine [B, T, R]."""
    scaled = (
        match(Call(_MUL, (Hole("wave"), Hole("scale"))), cos),
        match(Call(_MUL, (Hole("wave"), Hole("scale"))), sin),
    )
    scale = 1.0
    if scaled[0] and scaled[1] and scaled[0]["scale"] == scaled[1]["scale"] and isinstance(scaled[0]["scale"], float):
        cos, sin, scale = scaled[0]["wave"], scaled[1]["wave"], scaled[0]["scale"]
    computed = match(Call((aten.cos.default,), (Hole("angles"),)), cos)
    again = match(Call((aten.sin.default,), (Hole("angles"),)), sin)
    if computed is not None and again is not None and computed["angles"] is again["angles"]:
        found = angles_of(computed["angles"])
        return None if found is None else (*found, scale)
    look = Call((EMBEDDING.target,), (Hole("positions"), Hole("table")))
    first, second = match(look, cos), match(look, sin)
    if first is None or second is None or first["positions"] is not second["positions"]:
        return None
    positions = first["positions"]
    if positions.op != "placeholder" or {first["table"].op, second["table"].op} != {"get_attr"}:
        return None
    names = str(first["table"].target), str(second["table"].target)
    return _from_tables(program, before, positions, *names, scales)


def _from_tables(
    program: Program, before: fx.Node, positions: fx.Node, cos: str, sin: str, scales: dict[str, float]
) -> tuple[fx.Node, fx.Node, float] | None:
    name = f"{cos}.inv_freq"
    if name not in scales:
        made = frequencies(program.weights[cos].dense(), program.weights[sin].dense())
        if made is None:
            return None
        scales[name] = made[1]
        program.weights[name] = Weight.of(made[0])
    with program.graph.inserting_before(before):
        node = program.weight_node(name)
    node.meta["val"] = before.meta["val"].new_empty(program.weights[name].shape)
    return positions, node, scales[name]


def frequencies(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, float] | None:
    """(inv_freq [R], scale) of tables [S, R] of scale · cos(s · inv_freq); None for tables of anything else.

    The angle of row 1 is known to the precision of the table. Rows 2, 4, 8, … each halve the error, until the result
    is nearer to one float32 than to any other.
    """
    cos, sin = cos.double(), sin.double()
    if cos.dim() != 2 or cos.shape != sin.shape or cos.shape[0] < 2:
        return None
    scale = float(cos[0].mean())
    found = torch.atan2(sin[1], cos[1])
    row = 2
    while row < cos.shape[0]:
        told = torch.atan2(sin[row], cos[row])
        off = torch.remainder(told - row * found + math.pi, 2 * math.pi) - math.pi
        found, row = found + off / row, 2 * row
    inverse = found.float()
    angles = (torch.arange(cos.shape[0], dtype=torch.float32)[:, None] * inverse).double()
    error = max(float((scale * angles.cos() - cos).abs().max()), float((scale * angles.sin() - sin).abs().max()))
    return (inverse, round(scale, 7)) if error <= 2e-3 * abs(scale) else None
