"""One step of ONNX's optimizers: learning rate r, count t, then all values, gradients and states in turn."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ....errors import SmeltError
from ..registry import Tensor, op

DOMAIN = "ai.onnx.preview.training"
Group = tuple[Tensor, ...]


def _groups(tensors: Group, kinds: int) -> list[Group]:
    """(value, gradient, states…) of each optimized tensor."""
    count = len(tensors) // kinds
    return [tensors[i::count] for i in range(count)]


def _in_order(rows: Sequence[Group]) -> Group:
    return tuple(row[kind] for kind in range(len(rows[0])) for row in rows)


@op("Adagrad", domain=DOMAIN)
def adagrad(
    r: Tensor,
    t: Tensor,
    *tensors: Tensor,
    decay_factor: float = 0.0,
    epsilon: float = 1e-6,
    norm_coefficient: float = 0.0,
) -> Group:
    """Steps that shrink with the sum of squared gradients."""
    rate = r / (1 + t * decay_factor)
    rows = []
    for x, g, h in _groups(tensors, 3):
        slope = norm_coefficient * x + g
        squares = h + slope * slope
        rows.append((x - rate * slope / (squares.sqrt() + epsilon), squares))
    return _in_order(rows)


@op("Adam", domain=DOMAIN)
def adam(
    r: Tensor,
    t: Tensor,
    *tensors: Tensor,
    alpha: float = 0.9,
    beta: float = 0.999,
    epsilon: float = 1e-6,
    norm_coefficient: float = 0.0,
    norm_coefficient_post: float = 0.0,
) -> Group:
    """Steps along a running mean of gradients over the root of one of their squares."""
    count = t.to(r.dtype)
    started = torch.where(t > 0, torch.sqrt(1 - beta**count) / (1 - alpha ** count.clamp(min=1)), 1.0)
    rows = []
    for x, g, v, h in _groups(tensors, 4):
        slope = norm_coefficient * x + g
        mean, squares = alpha * v + (1 - alpha) * slope, beta * h + (1 - beta) * slope * slope
        moved = x - r * started * mean / (squares.sqrt() + epsilon)
        rows.append(((1 - norm_coefficient_post) * moved, mean, squares))
    return _in_order(rows)


@op("Momentum", domain=DOMAIN)
def momentum(
    r: Tensor,
    t: Tensor,
    *tensors: Tensor,
    alpha: float,
    beta: float,
    mode: str,
    norm_coefficient: float,
) -> Group:
    """Steps along a running sum of gradients, looking ahead in Nesterov's mode."""
    if mode not in ("standard", "nesterov"):
        raise SmeltError(f"Momentum: no mode {mode!r}; there are standard and nesterov")
    share = torch.where(t > 0, beta, 1.0)
    rows = []
    for x, g, v in _groups(tensors, 3):
        slope = norm_coefficient * x + g
        speed = alpha * v + share * slope
        step = slope + alpha * speed if mode == "nesterov" else speed
        rows.append((x - r * step, speed))
    return _in_order(rows)
