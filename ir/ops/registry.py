"""The dialect's registry: an op is a reference in plain PyTorch, a shape rule and a cost, known to torch.library."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

_LIBRARY = torch.library.Library("smelt", "DEF")
OPS: dict[Any, Op] = {}  # keyed by the overload that a graph node carries as its target

Shape = tuple[Any, ...]  # ints or sympy expressions
ZERO = sympy.Integer(0)


@dataclass(frozen=True)
class Cost:
    """Work of one node: floating-point operations and cache bytes read, as sympy expressions in B, T, S."""

    flops: sympy.Expr = ZERO
    cache_values: sympy.Expr = ZERO


@dataclass(frozen=True)
class Op:
    """A dialect op; `target` is the torch.library overload that stands in graphs."""

    name: str
    target: Any
    reference: Callable[..., torch.Tensor]
    cost: Callable[..., Cost]

    @property
    def arguments(self) -> tuple[str, ...]:
        """Argument names in order."""
        return tuple(a.name for a in self.target._schema.arguments)


def define(
    reference: Callable[..., torch.Tensor],
    shape: Callable[..., torch.Tensor],
    cost: Callable[..., Cost],
) -> Op:
    """Register `reference` as `smelt::<its name>`; `shape` returns an empty result, `cost` takes shapes for tensors."""
    name = reference.__name__
    _LIBRARY.define(name + torch.library.infer_schema(reference, mutates_args=()))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"smelt::{name}", shape, lib=_LIBRARY)
    target = getattr(torch.ops.smelt, name).default
    op = OPS[target] = Op(name, target, reference, cost)
    return op


def arguments(node: fx.Node) -> dict[str, Any]:
    """A dialect node's arguments by name, defaults filled in."""
    names, defaults = _signature(node.target)
    return {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}


@functools.cache
def _signature(target: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Argument names in order, and defaults; read once, because torch builds a schema anew on each access."""
    schema = target._schema.arguments
    return tuple(a.name for a in schema), {a.name: a.default_value for a in schema if a.has_default_value()}


def is_op(node: fx.Node, *ops: Op) -> bool:
    """Whether the node calls one of these dialect ops."""
    return node.op == "call_function" and any(node.target is op.target for op in ops)
