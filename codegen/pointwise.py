"""Pointwise ops as expressions: in C++ on vectors of sixteen floats, and in Triton."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from ..ir.ops import GATED, arguments

aten = torch.ops.aten


class Printer(NamedTuple):
    """How a language spells numbers and a * b + c; functions have the same names in all."""

    number: Callable[[float], str]
    fma: Callable[[str, str, str], str]


CPP = Printer(lambda value: f"splat({float(value)!r}f)", lambda a, b, c: f"fma({a}, {b}, {c})")
TRITON = Printer(lambda value: repr(float(value)), lambda a, b, c: f"({a} * {b} + {c})")


def _sum(to: Printer, a: str, b: str, alpha: float, sign: int) -> str:
    if alpha == 1:
        return f"({a} {'+' if sign > 0 else '-'} {b})"
    return to.fma(b, to.number(sign * alpha), a)


# each takes its printer and its arguments as texts by position, and the others as they are
_OPS: dict[Any, Callable[..., str]] = {
    aten.add.Tensor: lambda to, a, b, alpha=1: _sum(to, a, b, alpha, 1),
    aten.sub.Tensor: lambda to, a, b, alpha=1: _sum(to, a, b, alpha, -1),
    aten.mul.Tensor: lambda to, a, b: f"({a} * {b})",
    aten.div.Tensor: lambda to, a, b: f"({a} / {b})",
    aten.neg.default: lambda to, a: f"(-{a})",
    aten.gelu.default: lambda to, a, approximate="none": f"{'gelu' if approximate == 'none' else 'gelu_tanh'}({a})",
    aten.relu.default: lambda to, a: f"relu({a})",
    aten.sigmoid.default: lambda to, a: f"sigmoid({a})",
    aten.silu.default: lambda to, a: f"silu({a})",
    aten.tanh.default: lambda to, a: f"tanh({a})",
    GATED.target: lambda to, gate, up, act: f"({act}({gate}) * {up})",
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


def printed(node: fx.Node, names: Mapping[fx.Node, str], to: Printer = CPP) -> str:
    """The value of a node as an expression over the names of its inputs."""

    def operand(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return names[value]
        # the numbers of an op's tensors stand for tensors; a name, such as that of an activation, stands for itself
        return to.number(value) if isinstance(value, int | float) else value

    return _OPS[node.target](to, *map(operand, node.args), **node.kwargs)


def label(node: fx.Node) -> str:
    """`silu_mul` for a gated product, else the op's own name."""
    name = str(node.target).split(".")[1]
    return f"{arguments(node)['act']}_mul" if name == "gated" else name


def outside(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """What a chain reads, in order."""
    return list(dict.fromkeys(used for node in nodes for used in node.all_input_nodes if used not in nodes))


def statements(nodes: Sequence[fx.Node], names: Mapping[fx.Node, str]) -> tuple[list[str], str]:
    """C++ that computes the nodes in order, and the name of the last one's value; `names` are those of its inputs."""
    known, lines = dict(names), []
    for i, node in enumerate(nodes):
        lines.append(f"const f32x16 p{i} = {printed(node, known)};")
        known[node] = f"p{i}"
    return lines, known[nodes[-1]] if nodes else ""
