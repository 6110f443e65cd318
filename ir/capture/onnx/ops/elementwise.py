"""Elementwise ops: arithmetic, comparisons, logic and activations; operands broadcast as in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from ....errors import SmeltError
from ..registry import Operand, Tensor, Value, op
from .unsigned import UNSIGNED, divided, ordered, wide


def _first_is_tensor(a: Operand, b: Operand) -> tuple[Any, Any]:
    """Operands of a commutative op, the number behind the tensor."""
    return (a, b) if isinstance(a, torch.Tensor) else (b, a)


@op("Add", since=7)
@wide
def add(a: Operand, b: Operand) -> Tensor:
    left, right = _first_is_tensor(a, b)
    return torch.logical_or(left, right) if left.dtype is torch.bool else torch.add(left, right)


@op("Sub", since=7)
@wide
def sub(a: Operand, b: Operand) -> Tensor:
    if isinstance(a, torch.Tensor):
        return torch.sub(a, b)
    return torch.rsub(_tensor(b), a)


@op("Mul", since=7)
@wide
def mul(a: Operand, b: Operand) -> Tensor:
    left, right = _first_is_tensor(a, b)
    return torch.mul(left, right)


@op("Div", since=7)
def div(a: Operand, b: Operand) -> Tensor:
    tensor = a if isinstance(a, torch.Tensor) else _tensor(b)
    if tensor.is_floating_point() or tensor.is_complex():
        if isinstance(a, torch.Tensor):
            return torch.div(a, b)
        return torch.reciprocal(tensor) if a == 1 else torch.reciprocal(tensor) * a
    a = a if isinstance(a, torch.Tensor) else torch.full_like(tensor, a)
    if tensor.dtype in UNSIGNED:
        return divided(a, b if isinstance(b, torch.Tensor) else torch.full_like(tensor, b))[0]
    return torch.div(a, b, rounding_mode="trunc")


@op("Mod", since=10)
def mod(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    if a.dtype in UNSIGNED:
        return divided(a, b)[1]
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


@op("Pow", since=7)
def pow_(a: Operand, b: Operand) -> Tensor:
    if not isinstance(a, torch.Tensor):
        return torch.pow(a, _tensor(b))
    if isinstance(b, torch.Tensor):
        return torch.pow(a, b).to(a.dtype)
    whole = isinstance(b, float) and b.is_integer() and not a.is_floating_point()
    return torch.pow(a, int(b) if whole or float(b).is_integer() else b).to(a.dtype)


def _tensor(value: Operand) -> Tensor:
    assert isinstance(value, torch.Tensor)  # two known operands are computed before they come here
    return value


def _fold(function: Callable[[Tensor, Tensor], Tensor], xs: tuple[Tensor, ...]) -> Tensor:
    out = xs[0]
    for x in xs[1:]:
        out = function(out, x)
    return out


@op("Max", since=8)
def max_(*xs: Tensor) -> Tensor:
    return _fold(ordered(torch.maximum), xs)


@op("Min", since=8)
def min_(*xs: Tensor) -> Tensor:
    return _fold(ordered(torch.minimum), xs)


@op("Sum", since=8)
def sum_(*xs: Tensor) -> Tensor:
    return _fold(torch.add, xs)


@op("Mean", since=8)
def mean(*xs: Tensor) -> Tensor:
    return _fold(torch.add, xs) / len(xs)


def _not_bits(x: Tensor) -> Tensor:
    return torch.bitwise_not(x.long()).to(x.dtype) if x.dtype in UNSIGNED else torch.bitwise_not(x)


def _unary(name: str, function: Callable[[Tensor], Tensor]) -> None:
    def rule(x: Tensor) -> Tensor:
        return function(x)

    op(name)(rule)


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseNot": _not_bits,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "HardSwish": functional.hardswish,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Mish": functional.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": functional.softplus,
    "Softsign": functional.softsign,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}
for _name, _function in _FUNCTIONS.items():
    _unary(_name, _function)


@op("Floor")
def floor(x: Tensor) -> Tensor:
    return torch.floor(x)


@op("Ceil")
def ceil(x: Tensor) -> Tensor:
    return torch.ceil(x)


@op("Identity")
def identity(x: Value) -> Value:
    return x


@op("Equal", since=7)
def equal(a: Operand, b: Operand) -> Tensor:
    left, right = _first_is_tensor(a, b)
    return torch.eq(left, right)


def _swapped(function: Any, mirrored: Any, a: Operand, b: Operand) -> Tensor:
    made: Tensor = function(a, b) if isinstance(a, torch.Tensor) else mirrored(b, a)
    return made


@op("Less", since=7)
@ordered
def less(a: Operand, b: Operand) -> Tensor:
    return _swapped(torch.lt, torch.gt, a, b)


@op("LessOrEqual", since=12)
@ordered
def less_or_equal(a: Operand, b: Operand) -> Tensor:
    return _swapped(torch.le, torch.ge, a, b)


@op("Greater", since=7)
@ordered
def greater(a: Operand, b: Operand) -> Tensor:
    return _swapped(torch.gt, torch.lt, a, b)


@op("GreaterOrEqual", since=12)
@ordered
def greater_or_equal(a: Operand, b: Operand) -> Tensor:
    return _swapped(torch.ge, torch.le, a, b)


@op("And", since=7)
def and_(a: Tensor, b: Tensor) -> Tensor:
    return torch.logical_and(a, b)


@op("Or", since=7)
def or_(a: Tensor, b: Tensor) -> Tensor:
    return torch.logical_or(a, b)


@op("Xor", since=7)
def xor(a: Tensor, b: Tensor) -> Tensor:
    return torch.logical_xor(a, b)


@op("BitwiseAnd")
def bitwise_and(a: Tensor, b: Tensor) -> Tensor:
    return wide(torch.bitwise_and)(a, b)


@op("BitwiseOr")
def bitwise_or(a: Tensor, b: Tensor) -> Tensor:
    return wide(torch.bitwise_or)(a, b)


@op("BitwiseXor")
def bitwise_xor(a: Tensor, b: Tensor) -> Tensor:
    return wide(torch.bitwise_xor)(a, b)


@op("Where", since=9)
def where(condition: Tensor, a: Operand, b: Operand) -> Tensor:
    return torch.where(condition, a, b)


@op("Clip", since=11)
def clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    x = x if low is None else ordered(torch.maximum)(x, low.reshape(()))
    return x if high is None else ordered(torch.minimum)(x, high.reshape(()))  # high wins where they cross


@op("IsInf", since=10)
def is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    found = torch.isinf(x)
    if not detect_negative:
        found = found & (x > 0)
    return found if detect_positive else found & (x < 0)


@op("Gelu")
def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return functional.gelu(x, approximate=approximate)


@op("LeakyRelu", since=6)
def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    return functional.leaky_relu(x, alpha)


@op("PRelu", since=7)
def prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


@op("Elu", since=6)
def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return functional.elu(x, alpha)


@op("Celu", since=12)
def celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return functional.celu(x, alpha)


@op("Selu", since=6)
def selu(x: Tensor, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Tensor:
    return gamma * torch.where(x > 0, x, alpha * torch.exp(x) - alpha)


@op("HardSigmoid", since=6)
def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    return torch.clamp(alpha * x + beta, 0, 1)


@op("ThresholdedRelu", since=10)
def thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return torch.where(x > alpha, x, torch.zeros_like(x))


@op("Swish")
def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return functional.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


@op("Shrink", since=9)
def shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    zero = torch.zeros_like(x)
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, zero)).to(x.dtype)


@op("BitShift", since=11)
def bit_shift(x: Tensor, by: Tensor, *, direction: str) -> Tensor:
    """Bits moved; a shift outside the type's width leaves nothing, or copies of the sign."""
    if direction not in ("LEFT", "RIGHT"):
        raise SmeltError(f"BitShift: direction is LEFT or RIGHT, not {direction!r}")
    bits, count = x.to(torch.int64), by.to(torch.int64)
    inside = (count >= 0) & (count < 8 * x.element_size())
    count = torch.where(inside, count, 0)
    if direction == "LEFT":
        return torch.where(inside, bits << count, 0).to(x.dtype)
    moved = bits >> count
    if x.dtype is torch.uint64:  # what came in from the left are copies of a bit that is no sign
        moved = torch.where(count > 0, moved & ~(torch.full_like(moved, -1) << (64 - count.clamp(min=1))), moved)
    beyond = torch.where(bits < 0, -1, 0) if x.dtype.is_signed else torch.zeros_like(bits)
    return torch.where(inside, moved, beyond).to(x.dtype)
