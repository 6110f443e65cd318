"""Codebooks of vectors: weighted k-means over samples, and grids that are optimal for a Gaussian in a few dims."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from . import signposts

LOOPS = 25
SAMPLES = 128  # of a Gaussian for each point of a grid
PIECE = 1 << 22  # distances held at once


@functools.lru_cache(maxsize=8)
def gaussian(dims: int, count: int) -> torch.Tensor:
    """The `count` points [count, dims] with the least squared error on N(0, I), by k-means over fixed samples.

    HIGGS: Pushing the Limits of Large Language Model Quantization via the Linearity Theorem (2024, arXiv 2411.17525).
    """
    if dims == 1:
        return torch.tensor(signposts.gaussian(count))[:, None]
    points = torch.quasirandom.SobolEngine(dims, scramble=True, seed=0).draw(max(1 << 13, SAMPLES * count))
    samples = torch.special.ndtri(points.double().clamp(1e-7, 1 - 1e-7)).float()
    return fitted(samples, None, count)


def fitted(x: torch.Tensor, weight: torch.Tensor | None, count: int) -> torch.Tensor:
    """The `count` centres [count, c] of samples x [M, c] by k-means from a k-means++ start that follows from a seed.

    `weight` [M]: how much each sample counts. Centres that lose all samples go to those with the greatest error.
    """
    x = x.float()
    mass = torch.ones(len(x), device=x.device) if weight is None else weight.float().clamp_min(0)
    if not len(x) or float(mass.sum()) <= 0:
        return x.new_zeros(count, x.shape[-1])
    centres = _start(x, mass, count)
    for _ in range(LOOPS):
        codes, error = assigned(x, centres)
        total = mass.new_zeros(count).index_add_(0, codes, mass)
        moment = torch.zeros_like(centres).index_add_(0, codes, x * mass[:, None])
        moved = torch.where(total[:, None] > 0, moment / total.clamp_min(1e-30)[:, None], centres)
        empty = torch.nonzero(total == 0).flatten()
        if len(empty):
            far = (error * mass).topk(min(len(empty), len(x))).indices
            moved[empty[: len(far)]] = x[far]
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def assigned(x: torch.Tensor, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of the nearest centre [M] and the squared distance to it [M]; x [M, c], centres [count, c]."""
    codes, errors = [], []
    sizes = centres.square().sum(-1)
    for piece in _pieces(x, len(centres)):
        distance = torch.addmm(sizes[None], piece, centres.mT, alpha=-2)
        least = distance.min(-1)
        codes.append(least.indices)
        errors.append((least.values + piece.square().sum(-1)).clamp_min(0))
    return torch.cat(codes), torch.cat(errors)


def _pieces(x: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
    yield from x.split(max(1, PIECE // count)) if len(x) else (x,)


def _start(x: torch.Tensor, mass: torch.Tensor, count: int) -> torch.Tensor:
    """k-means++: each next centre is a sample drawn by its weighted squared distance to those there are."""
    random = torch.Generator().manual_seed(0)
    draws = torch.rand(count, generator=random).tolist()
    chosen = [_drawn(mass, draws[0])]
    distance = (x - x[chosen[0]]).square().sum(-1)
    for draw in draws[1:]:
        chosen.append(_drawn(distance * mass, draw))
        distance = torch.minimum(distance, (x - x[chosen[-1]]).square().sum(-1))
    return x[torch.tensor(chosen, device=x.device)].clone()


def _drawn(mass: torch.Tensor, draw: float) -> int:
    upto = mass.double().cumsum(0)
    return min(int(torch.searchsorted(upto, upto[-1] * draw, right=True)), len(mass) - 1)
