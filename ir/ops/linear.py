"""Matrix products with a weight: linear, the vocabulary head, embedding and routed experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.nn import functional

from .registry import Cost, Shape, define


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y = x Wᵀ + b; x [..., K], weight [N, K], bias [N] → [..., N]."""
    return functional.linear(x, weight, bias)


def _linear_shape(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear_cost(x: Shape, weight: Shape, bias: Shape | None = None) -> Cost:
    return Cost(flops=2 * sympy.prod([sympy.sympify(d) for d in x]) * weight[0])


LINEAR = define(linear, _linear_shape, _linear_cost)


def head(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Logits over the vocabulary: `linear` by another name, so that passes can tell the last projection; [..., V]."""
    return functional.linear(x, weight, bias)


HEAD = define(head, _linear_shape, _linear_cost)


def embedding(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Row lookup: ids [...] integer, weight [V, K] → [..., K]."""
    return functional.embedding(ids, weight)


def _embedding_shape(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight.new_empty((*ids.shape, weight.shape[1]))


def _embedding_cost(ids: Shape, weight: Shape) -> Cost:
    return Cost()


EMBEDDING = define(embedding, _embedding_shape, _embedding_cost)

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


def gated(gate: torch.Tensor, up: torch.Tensor, act: str) -> torch.Tensor:
    """act(gate) · up elementwise: the middle of a gated MLP; both [..., I]."""
    return ACTIVATIONS[act](gate) * up


def _gated_shape(gate: torch.Tensor, up: torch.Tensor, act: str) -> torch.Tensor:
    return torch.empty_like(gate)


def _gated_cost(gate: Shape, up: Shape, act: str) -> Cost:
    return Cost(flops=5 * sympy.prod([sympy.sympify(d) for d in gate]))


GATED = define(gated, _gated_shape, _gated_cost)


def experts(
    x: torch.Tensor,
    chosen: torch.Tensor,
    shares: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    act: str,
) -> torch.Tensor:
    """Routed gated MLPs: y_n = Σ_j shares[n, j] · down_e (act(gate_e x_n) · up_e x_n) with e = chosen[n, j].

    x [N, K], chosen [N, J] expert indices, shares [N, J], gate_up [E, 2 I, K] (gate rows first), down [E, K, I].
    """
    out = torch.zeros_like(x)
    for e in torch.unique(chosen).tolist():
        rows, slot = torch.where(chosen == e)
        gate, up = functional.linear(x[rows], gate_up[e]).chunk(2, -1)
        y = functional.linear(ACTIVATIONS[act](gate) * up, down[e])
        out.index_add_(0, rows, y * shares[rows, slot, None].to(y.dtype))
    return out


def _experts_shape(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(x)


def _experts_cost(x: Shape, chosen: Shape, shares: Shape, gate_up: Shape, down: Shape, act: str) -> Cost:
    per_expert = 2 * (gate_up[1] * gate_up[2] + down[1] * down[2])
    return Cost(flops=sympy.sympify(x[0]) * chosen[1] * per_expert)


EXPERTS = define(experts, _experts_shape, _experts_cost)
