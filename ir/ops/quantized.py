"""Rounding of activations to integers in groups, as its values: what an integer matrix product multiplies with."""

from __future__ import annotations

import sympy
import torch

from .registry import Cost, Shape, define


def quantized(x: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """round(x / s) · s with s = max|x| / (2^(bits-1) - 1) over each group of the last dim; [..., K] → [..., K].

    Scales are float32, rounding is to even. `group` divides K; 0 is the whole row.
    """
    groups = x.float().unflatten(-1, (-1, group or x.shape[-1]))
    scale = groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    codes = (groups / torch.where(scale == 0, 1.0, scale)).round()
    rounded: torch.Tensor = (codes * scale).flatten(-2).to(x.dtype).contiguous()
    return rounded


def _quantized_shape(x: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _quantized_cost(x: Shape, bits: int, group: int) -> Cost:
    return Cost(flops=4 * sympy.prod([sympy.sympify(d) for d in x]))


QUANTIZED = define(quantized, _quantized_shape, _quantized_cost)
