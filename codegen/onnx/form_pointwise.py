"""ATen's elementwise ops, comparisons and choices, with ATen's promotion of types."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from ...ir.errors import SmeltError
from .builder import Builder, Value, onnx_type
from .forms import Given, form

NUMPY = {
    torch.float32: np.float32, torch.float64: np.float64, torch.float16: np.float16, torch.int64: np.int64,
    torch.int32: np.int32, torch.int16: np.int16, torch.int8: np.int8, torch.uint8: np.uint8, torch.bool: np.bool_,
}  # fmt: skip
SAME = {
    "abs": "Abs", "neg": "Neg", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "sin": "Sin", "cos": "Cos", "tanh": "Tanh",
    "sigmoid": "Sigmoid", "erf": "Erf", "relu": "Relu", "floor": "Floor", "ceil": "Ceil", "round": "Round",
    "sign": "Sign", "reciprocal": "Reciprocal", "logical_not": "Not", "bitwise_not": "Not", "hardswish": "HardSwish",
    "mish": "Mish", "tan": "Tan", "atan": "Atan", "asin": "Asin", "acos": "Acos", "sinh": "Sinh", "cosh": "Cosh",
}  # fmt: skip
BINARY = {"add": "Add", "sub": "Sub", "mul": "Mul", "maximum": "Max", "minimum": "Min", "logical_and": "And",
          "logical_or": "Or", "logical_xor": "Xor", "bitwise_and": "And", "bitwise_or": "Or"}  # fmt: skip
COMPARISONS = {"eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual"}


def typed(b: Builder, value: Any, dtype: torch.dtype) -> str:
    """A tensor or number in this type."""
    if not isinstance(value, Value):
        return b.const(np.array(value, NUMPY[dtype]))
    name = b.name_of(value)
    return name if value.dtype == dtype else str(b.op("Cast", name, to=onnx_type(dtype)))


def common(*values: Any) -> torch.dtype:
    """The type in which ATen compares: that of tensors, numbers lift integers to float32."""
    tensors = [value.dtype for value in values if isinstance(value, Value)]
    found = tensors[0]
    for dtype in tensors[1:]:
        found = torch.promote_types(found, dtype)
    lifts = any(isinstance(value, float) for value in values) and not found.is_floating_point
    return torch.float32 if lifts else found


@form(*(f"aten.{name}.default" for name in SAME))
def unary(b: Builder, node: fx.Node, a: Given) -> str:
    """An op that ONNX has by another name."""
    x, name = next(iter(a.values())), str(node.target).split(".")[1]
    if name == "logical_not":
        return str(b.op("Not", typed(b, x, torch.bool)))
    kind = "BitwiseNot" if name == "bitwise_not" and node.meta["dtype"] != torch.bool else SAME[name]
    return str(b.op(kind, typed(b, x, node.meta["dtype"])))


@form(*(f"aten.{name}.{kind}" for name in BINARY for kind in ("Tensor", "default", "Scalar")))
def binary(b: Builder, node: fx.Node, a: Given) -> str:
    """Two operands in the result's type; add and sub scale the second by `alpha`."""
    dtype = node.meta["dtype"]
    name = str(node.target).split(".")[1]
    if name.startswith("bitwise") and dtype != torch.bool:
        kind = "BitwiseAnd" if name == "bitwise_and" else "BitwiseOr"
    else:
        kind = BINARY[name]
    left, right = typed(b, a["self"], dtype), typed(b, a["other"], dtype)
    if a.get("alpha", 1) != 1:
        right = b.op("Mul", right, typed(b, a["alpha"], dtype))
    return str(b.op(kind, left, right))


@form("aten.rsub.Scalar", "aten.rsub.Tensor")
def rsub(b: Builder, node: fx.Node, a: Given) -> str:
    """other - self."""
    dtype = node.meta["dtype"]
    return str(b.op("Sub", typed(b, a["other"], dtype), typed(b, a["self"], dtype)))


@form("aten.div.Tensor", "aten.div.Scalar", "aten.div.Tensor_mode")
def div(b: Builder, node: fx.Node, a: Given) -> str:
    """Division; integers divide to float32, `rounding_mode` rounds down or to zero."""
    dtype, mode = node.meta["dtype"], a.get("rounding_mode")
    if dtype.is_floating_point:
        ratio = b.op("Div", typed(b, a["self"], dtype), typed(b, a["other"], dtype))
        if mode is None:
            return str(ratio)
        down = b.op("Floor", ratio)
        return str(down if mode == "floor" else b.op("Mul", b.op("Sign", ratio), b.op("Floor", b.op("Abs", ratio))))
    return _whole(b, typed(b, a["self"], dtype), typed(b, a["other"], dtype), dtype, mode)


@form("aten.floor_divide.default", "aten.floor_divide.Scalar")
def floor_divide(b: Builder, node: fx.Node, a: Given) -> str:
    """The quotient rounded down."""
    dtype = node.meta["dtype"]
    left, right = typed(b, a["self"], dtype), typed(b, a["other"], dtype)
    return (
        str(b.op("Floor", b.op("Div", left, right)))
        if dtype.is_floating_point
        else _whole(b, left, right, dtype, "floor")
    )


def _whole(b: Builder, left: str, right: str, dtype: torch.dtype, mode: str | None) -> str:
    """Integer division; ONNX rounds to zero, `floor` takes the remainder of the divisor's sign off first."""
    if mode == "floor":
        left = b.op("Sub", left, b.op("Mod", left, right))
    return str(b.op("Div", left, right))


@form("aten.remainder.Tensor", "aten.remainder.Scalar")
def remainder(b: Builder, node: fx.Node, a: Given) -> str:
    """The remainder with the divisor's sign."""
    dtype = node.meta["dtype"]
    left, right = typed(b, a["self"], dtype), typed(b, a["other"], dtype)
    if not dtype.is_floating_point:
        return str(b.op("Mod", left, right))
    return str(b.op("Sub", left, b.op("Mul", right, b.op("Floor", b.op("Div", left, right)))))


@form("aten.pow.Tensor_Scalar", "aten.pow.Tensor_Tensor", "aten.pow.Scalar")
def power(b: Builder, node: fx.Node, a: Given) -> str:
    """self ^ exponent; a square is a product."""
    dtype, exponent = node.meta["dtype"], a["exponent"]
    base = typed(b, a["self"], dtype)
    if exponent == 2:
        return str(b.op("Mul", base, base))
    return str(b.op("Pow", base, typed(b, exponent, dtype)))


@form(*(f"aten.{name}.{kind}" for name in (*COMPARISONS, "ne") for kind in ("Tensor", "Scalar")))
def compare(b: Builder, node: fx.Node, a: Given) -> str:
    """A comparison in the operands' common type."""
    dtype = common(a["self"], a["other"])
    name = str(node.target).split(".")[1]
    if dtype == torch.bool and name not in ("eq", "ne"):
        dtype = torch.int64
    left, right = typed(b, a["self"], dtype), typed(b, a["other"], dtype)
    return str(b.op("Not", b.op("Equal", left, right)) if name == "ne" else b.op(COMPARISONS[name], left, right))


@form("aten.rsqrt.default")
def rsqrt(b: Builder, node: fx.Node, a: Given) -> str:
    """1 / sqrt(x)."""
    return str(b.op("Reciprocal", b.op("Sqrt", a["self"])))


@form("aten.silu.default")
def silu(b: Builder, node: fx.Node, a: Given) -> str:
    """x · sigmoid(x)."""
    return str(b.op("Mul", a["self"], b.op("Sigmoid", a["self"])))


@form("aten.gelu.default")
def gelu(b: Builder, node: fx.Node, a: Given) -> str:
    """Gelu by erf or its tanh approximation."""
    return str(b.op("Gelu", a["self"], approximate=a["approximate"]))


@form("aten.leaky_relu.default", "aten.elu.default")
def leaky(b: Builder, node: fx.Node, a: Given) -> str:
    """Relu with a slope, or an exponential, below zero."""
    if "negative_slope" in a:
        return str(b.op("LeakyRelu", a["self"], alpha=float(a["negative_slope"])))
    if a["scale"] != 1 or a["input_scale"] != 1:
        raise SmeltError(f"{b.name}: %{node.name}: elu with scales has no ONNX form")
    return str(b.op("Elu", a["self"], alpha=float(a["alpha"])))


@form("aten.hardsigmoid.default")
def hardsigmoid(b: Builder, node: fx.Node, a: Given) -> str:
    """clip(x / 6 + 1 / 2, 0, 1)."""
    return str(b.op("HardSigmoid", a["self"], alpha=1 / 6, beta=0.5))


@form("aten.softplus.default")
def softplus(b: Builder, node: fx.Node, a: Given) -> str:
    """log(1 + exp(beta x)) / beta; above the threshold the difference to x is below float32's."""
    beta = b.const(float(a["beta"]))
    return str(b.op("Div", b.op("Softplus", b.op("Mul", a["self"], beta)), beta))


@form("aten.clamp.default", "aten.hardtanh.default", "aten.clamp_min.default", "aten.clamp_max.default")
def clamp(b: Builder, node: fx.Node, a: Given) -> str:
    """Values between two bounds, either of which may be missing."""
    low, high = a.get("min", a.get("min_val")), a.get("max", a.get("max_val"))
    dtype = node.meta["dtype"]
    bounds = [None if bound is None else typed(b, bound, dtype) for bound in (low, high)]
    return str(b.op("Clip", typed(b, a["self"], dtype), *bounds))


@form("aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf", "aten.where.Scalar")
def where(b: Builder, node: fx.Node, a: Given) -> str:
    """self where the condition holds, else other."""
    dtype = node.meta["dtype"]
    return str(
        b.op("Where", typed(b, a["condition"], torch.bool), typed(b, a["self"], dtype), typed(b, a["other"], dtype))
    )


@form("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def masked_fill(b: Builder, node: fx.Node, a: Given) -> str:
    """A value where the mask holds."""
    dtype = node.meta["dtype"]
    return str(b.op("Where", typed(b, a["mask"], torch.bool), typed(b, a["value"], dtype), typed(b, a["self"], dtype)))


@form(
    "aten.to.dtype",
    "aten.to.dtype_layout",
    "aten._to_copy.default",
    "aten.type_as.default",
    "aten.float.default",
    "aten.to.device",
    "aten.to.other",
)
def convert(b: Builder, node: fx.Node, a: Given) -> str:
    """Another type; everything lies on one device."""
    return typed(b, next(iter(a.values())), node.meta["dtype"])


@form(
    "aten.contiguous.default",
    "aten.clone.default",
    "aten.detach.default",
    "aten.alias.default",
    "aten.dropout.default",
    "aten.lift_fresh_copy.default",
    "aten.feature_dropout.default",
    "aten.alpha_dropout.default",
)
def same(b: Builder, node: fx.Node, a: Given) -> str:
    """The value itself: layout in memory means nothing to a graph, and nothing is dropped at inference."""
    return b.name_of(next(iter(a.values())))
