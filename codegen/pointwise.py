"""Chains of pointwise ops as C++ on vectors of sixteen floats: epilogues of products, and kernels of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ..ir.ops import GATED

aten = torch.ops.aten


def _number(value: float) -> str:
    return f"splat({float(value)!r}f)"


def _scaled(a: str, b: str, alpha: float, sign: str) -> str:
    return f"({a} {sign} {b})" if alpha == 1 else f"fma({b}, {_number(alpha if sign == '+' else -alpha)}, {a})"


def _gelu(x: str, approximate: str = "none") -> str:
    return f"{'gelu_tanh' if approximate == 'tanh' else 'gelu'}({x})"


# each takes its arguments in C++ by position, and the others as they are
_OPS: dict[Any, Callable[..., str]] = {
    aten.add.Tensor: lambda a, b, alpha=1: _scaled(a, b, alpha, "+"),
    aten.sub.Tensor: lambda a, b, alpha=1: _scaled(a, b, alpha, "-"),
    aten.mul.Tensor: lambda a, b: f"({a} * {b})",
    aten.div.Tensor: lambda a, b: f"({a} / {b})",
    aten.neg.default: lambda a: f"(-{a})",
    aten.gelu.default: _gelu,
    aten.relu.default: lambda a: f"relu({a})",
    aten.sigmoid.default: lambda a: f"sigmoid({a})",
    aten.silu.default: lambda a: f"silu({a})",
    aten.tanh.default: lambda a: f"tanh({a})",
    GATED.target: lambda gate, up, act: f"({act}({gate}) * {up})",
}


def is_pointwise(node: fx.Node) -> bool:
    """Whether a node computes every float32 from those at the same place, by an op that is printed here."""
    if node.op != "call_function" or node.target not in _OPS:
        return False
    if not node.all_input_nodes or node.meta.get("dtype", torch.float32) is not torch.float32:
        return False
    return all(
        value.meta.get("dtype", torch.float32) is torch.float32 if isinstance(value, fx.Node) else _plain(value)
        for value in (*node.args, *node.kwargs.values())
    )


def _plain(value: Any) -> bool:
    if isinstance(value, int | float):
        return not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, str)


def statements(nodes: Sequence[fx.Node], names: Mapping[fx.Node, str]) -> tuple[list[str], str]:
    """C++ that computes the nodes in order, and the name of the last one's value; `names` are those of its inputs."""
    known, lines = dict(names), []
    for i, node in enumerate(nodes):
        args = [_operand(value, known, node) for value in node.args]
        kwargs = {name: value for name, value in node.kwargs.items()}
        lines.append(f"const f32x16 p{i} = {_OPS[node.target](*args, **kwargs)};")
        known[node] = f"p{i}"
    return lines, known[nodes[-1]] if nodes else ""


def _operand(value: Any, known: Mapping[fx.Node, str], node: fx.Node) -> Any:
    if isinstance(value, fx.Node):
        return known[value]
    # the numbers of an op's tensors stand for tensors; a name, such as that of an activation, stands for itself
    return _number(value) if isinstance(value, int | float) else value
