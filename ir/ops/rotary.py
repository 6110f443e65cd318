"""Rotary position embedding in the split-half layout (RoFormer, section 3.2; the layout of GPT-NeoX and Llama)."""

from __future__ import annotations

import sympy
import torch

from .registry import Cost, Shape, define


def rotary(x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Rotates the first 2 R dims of each head by angle positions · inv_freq and passes the rest; times `scale`.

    x [B, H, T, D], positions [B, T] integer, inv_freq [R]. Dim i < R pairs with dim i + R. `scale` is the attention
    factor that long-context variants put on cos and sin; it does not touch the dims that are passed.
    """
    angle = positions[:, None, :, None].float() * inv_freq.float()
    cos, sin = (torch.cos(angle) * scale).to(x.dtype), (torch.sin(angle) * scale).to(x.dtype)
    r = inv_freq.shape[0]
    a, b, rest = x[..., :r], x[..., r : 2 * r], x[..., 2 * r :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def _rotary_shape(x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    return x.new_empty(x.shape)


def _rotary_cost(x: Shape, positions: Shape, inv_freq: Shape, scale: float = 1.0) -> Cost:
    return Cost(flops=3 * sympy.prod([sympy.sympify(d) for d in x]))


ROTARY = define(rotary, _rotary_shape, _rotary_cost)
