"""Normalisation over the last dimension, computed in fp32 and returned in the input's type."""

from __future__ import annotations

import sympy
import torch
from torch.nn import functional

from .registry import Cost, Shape, define


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) · (weight + offset); x [..., K], weight [K]. Gemma stores weight - 1: offset 1."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * (weight.float() + offset)).to(x.dtype)


def _rms_norm_shape(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    return torch.empty_like(x)


def _rms_norm_cost(x: Shape, weight: Shape, eps: float, offset: float = 0.0) -> Cost:
    return Cost(flops=4 * sympy.prod([sympy.sympify(d) for d in x]))


RMS_NORM = define(rms_norm, _rms_norm_shape, _rms_norm_cost)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """(x - mean) / sqrt(var + eps) · weight + bias; x [..., K], weight and bias [K]."""
    return functional.layer_norm(x, weight.shape, weight, bias, eps)


def _layer_norm_shape(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    return torch.empty_like(x)


def _layer_norm_cost(x: Shape, weight: Shape, bias: Shape | None, eps: float) -> Cost:
    return Cost(flops=8 * sympy.prod([sympy.sympify(d) for d in x]))


LAYER_NORM = define(layer_norm, _layer_norm_shape, _layer_norm_cost)
