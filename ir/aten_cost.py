"""Operations of the ATen calls that raising leaves in a graph; a call that is no matrix product does one a result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from .ops import EMBEDDING, OPS


def count(shape: Any) -> sympy.Expr:
    """Elements of a shape."""
    return sympy.prod(shape, start=sympy.Integer(1))


def is_view(node: fx.Node) -> bool:
    """Whether the call moves no data: views, sizes, and picking one of several results."""
    target: Any = node.target
    if node.op != "call_function" or target in OPS:
        return False
    if not isinstance(target, torch._ops.OpOverload) or "value" in node.meta:
        return True  # Python's operators stand for arithmetic on sizes, and for picking a result
    if not any(result.alias_info for result in target._schema.returns):
        return False
    source = node.args[0]  # `to` and its like return their argument only where there is nothing to convert
    return not isinstance(source, fx.Node) or _one(source.meta["dtype"]) == _one(node.meta["dtype"])


def reads_rows(node: fx.Node, table: fx.Node) -> bool:
    """Whether the call looks rows of `table` up instead of reading all of it."""
    if node.target is EMBEDDING.target:
        return node.args[1] is table
    return _name(node) in ("embedding", "index", "index_select", "gather") and node.args[0] is table


def product_flops(node: fx.Node) -> sympy.Expr | None:
    """Operations of a matrix product or convolution, or None for every other call."""
    rule = _PRODUCTS.get(_name(node))
    return None if rule is None else sympy.sympify(rule(node))


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name.removeprefix("aten::") if schema else ""


def _one(dtype: Any) -> Any:
    return dtype[0] if isinstance(dtype, tuple) else dtype


def _shape(argument: Any) -> tuple[Any, ...]:
    shape: tuple[Any, ...] = argument.meta["shape"]
    return shape


def _over(index: int) -> Callable[[fx.Node], Any]:
    """2 K a result, K the last dim of the argument at `index`."""
    return lambda node: 2 * count(_shape(node)) * _shape(node.args[index])[-1]


def _convolution(node: fx.Node) -> Any:
    """2 I / groups · taps a result; the other way round, 2 O / groups · taps a value of the input."""
    transposed = "transpose" in _name(node) or (_name(node) == "convolution" and bool(node.args[6]))
    return 2 * count(_shape(node.args[0] if transposed else node)) * count(_shape(node.args[1])[1:])


def _einsum(node: fx.Node) -> Any:
    """2 · the sizes of all summed indices a result."""
    equation, tensors = str(node.args[0]).replace(" ", ""), node.args[1]
    inputs, _, output = equation.partition("->")
    sizes: dict[str, Any] = {}
    for labels, tensor in zip(inputs.split(","), tensors, strict=True):  # type: ignore[arg-type]  # a list of nodes
        front, _, back = labels.partition("...")
        shape = _shape(tensor)
        sizes.update(zip(front, shape, strict=False))
        sizes.update(zip(reversed(back), reversed(shape), strict=False))
    summed = [size for label, size in sizes.items() if label not in output]
    return (2 if summed else 1) * count(_shape(node)) * count(summed)


def _attention(node: fx.Node) -> Any:
    query, key, value = (_shape(argument) for argument in node.args[:3])
    return 2 * count(query[:-1]) * key[-2] * (query[-1] + value[-1])


_PRODUCTS: dict[str, Callable[[fx.Node], Any]] = {
    **dict.fromkeys(("mm", "bmm", "matmul", "linear", "mv", "dot", "inner"), _over(0)),
    **dict.fromkeys(("addmm", "baddbmm", "addbmm", "addmv"), _over(1)),
    **{f"conv{kind}{n}d": _convolution for n in (1, 2, 3) for kind in ("", "_transpose")},
    "convolution": _convolution,
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
}
