"""Hadamard transform of activations: spreads what stands out in a row over its neighbours, by additions alone."""

from __future__ import annotations

import math

import sympy
import torch

from .registry import Cost, Shape, define


def walsh(x: torch.Tensor) -> torch.Tensor:
    """x @ H over a last dim of a power of two; H is Sylvester's symmetric matrix of ones and minus ones."""
    size = x.shape[-1]
    if size & (size - 1):
        raise ValueError(f"Sylvester's Hadamard matrices have a power of two of rows, not {size}")
    for _ in range(size.bit_length() - 1):  # each turn takes the last bit of the place, and puts it first
        even, odd = x[..., ::2], x[..., 1::2]
        x = torch.cat([even + odd, even - odd], -1)
    return x


def hadamard(x: torch.Tensor, size: int) -> torch.Tensor:
    """Each block of `size` neighbours in a row times H / √size; [..., K] → [..., K], its own inverse.

    `size` is a power of two that divides K. Sums are float32.
    """
    turned = walsh(x.float().unflatten(-1, (-1, size))) * (1 / math.sqrt(size))
    return turned.flatten(-2).to(x.dtype).contiguous()


def _hadamard_shape(x: torch.Tensor, size: int) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _hadamard_cost(x: Shape, size: int) -> Cost:
    return Cost(flops=size.bit_length() * sympy.prod([sympy.sympify(d) for d in x]))


HADAMARD = define(hadamard, _hadamard_shape, _hadamard_cost)
