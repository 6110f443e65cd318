"""Random rotations of channels: a Hadamard matrix behind random signs, and more where the width is odd in part."""

from __future__ import annotations

import math

import torch

from ...ir.ops.hadamard import walsh


def turned(x: torch.Tensor, seed: int) -> torch.Tensor:
    """x R over the last dim K, in float64; the same seed and width give the same R.

    K = m · 2^k with m odd: R = D (Q (x) H / √2^k) with random signs D, a random orthogonal Q [m, m] and the Hadamard
    matrix H of 2^k.
    """
    width = x.shape[-1]
    size = width & -width
    random = torch.Generator().manual_seed(seed)
    signs = 2 * torch.randint(0, 2, (width,), generator=random) - 1
    blocks = walsh((x.double() * signs).unflatten(-1, (-1, size))) / math.sqrt(size)
    if size < width:
        made = torch.linalg.qr(torch.randn(width // size, width // size, generator=random, dtype=torch.float64))
        blocks = (blocks.mT @ (made.Q * made.R.diagonal().sign())).mT  # uniform over all rotations and reflections
    return blocks.flatten(-2)
