"""What a node may call, and by which name: ATen overloads, dialect ops and a short table of Python operators."""

from __future__ import annotations

import math
import operator
import re
from typing import Any

import torch

from .errors import SmeltError, nearest
from .ops import OPS

OPERATORS: dict[str, Any] = {
    **{f"operator.{f.__name__.rstrip('_')}": f for f in (
        operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod,
        operator.neg, operator.pow, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge,
        operator.and_, operator.or_, operator.not_,
    )},
    **{f"torch.{f.__name__}": f for f in (
        torch.sym_max, torch.sym_min, torch.sym_int, torch.sym_float, torch.sym_not, torch.sym_ite,
    )},
    **{f"math.{f.__name__}": f for f in (math.ceil, math.floor, math.trunc)},
}  # fmt: skip
_NAMES = {function: name for name, function in OPERATORS.items()}
_ATEN = re.compile(r"aten\.([A-Za-z_]\w*)\.([A-Za-z_]\w*)", re.ASCII)


def target_name(target: Any) -> str:
    """The name that `find_target` reads back: `smelt.linear`, `aten.view.default`, `operator.getitem`, ….

    Raises SmeltError for anything that a Program may not call.
    """
    if reason := refusal(target):
        raise SmeltError(reason)
    if target in OPS:
        return f"smelt.{OPS[target].name}"
    return _NAMES.get(target) or str(target)


def find_target(name: str) -> Any:
    """The callable of a printed name; nothing is imported or evaluated to find it. Raises SmeltError."""
    target = _look_up(name)
    if reason := refusal(target):
        raise SmeltError(reason)
    return target


def refusal(target: Any) -> str | None:
    """Why a node may not call this, or None."""
    if target in OPS or target in _NAMES:
        return None
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return f"'{target}' is neither an ATen overload nor an op of the dialect"
    if target._schema.is_mutable:
        return f"'{target}' writes in place: every node of a Program is a value"
    if any(a.name == "filename" for a in target._schema.arguments):
        return f"'{target}' reads or writes a file"
    return None


def _look_up(name: str) -> Any:
    if name in OPERATORS:
        return OPERATORS[name]
    if name.startswith("smelt."):
        ops = {f"smelt.{op.name}": target for target, op in OPS.items()}
        if name not in ops:
            raise SmeltError(f"the dialect has no op '{name}'{nearest(name, ops)}")
        return ops[name]
    if not (found := _ATEN.fullmatch(name)):
        known = [*OPERATORS, *(f"smelt.{op.name}" for op in OPS.values())]
        raise SmeltError(
            f"unknown op '{name}'{nearest(name, known)}; a node calls smelt.<op>, aten.<op>.<overload> or an operator"
        )
    packet = getattr(torch.ops.aten, found[1], None)
    if not isinstance(packet, torch._ops.OpOverloadPacket) or found[2] not in packet.overloads():
        raise SmeltError(f"this torch ({torch.__version__}) has no ATen op '{name}'")
    return getattr(packet, found[2])
