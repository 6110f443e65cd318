"""Interpolative decomposition from a Gram matrix: a few columns of A that the others are combinations of.

With G = AᵀA, pivoted Cholesky of G picks the columns that pivoted QR picks on A, and A itself need not be kept.
"""

from __future__ import annotations

import torch
from torch import fx

from ...ir.errors import SmeltError
from ...ir.ops import arguments
from .._walk import Walk


def pivots(gram: torch.Tensor, units: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `count` units that column-pivoted QR picks, and what is left unexplained after each of them.

    gram: float64 [K, K]; units: int64 [U, W], columns that are picked together, by the Frobenius norm of what is left
    of them. Returns indices int64 [count] in the order picked, and ‖A - A_picked T‖ / ‖A‖ [count].
    """
    width, size = units.shape[1], gram.shape[0]
    left = gram.diagonal().clone()
    total = float(left.sum())
    noise = torch.finfo(gram.dtype).eps * size * float(left.max())
    factor = gram.new_zeros(count * width, size)  # gram ≈ factorᵀ factor
    rank = 0
    free = torch.ones(len(units), dtype=torch.bool)
    order, errors = [], []
    for _ in range(count):
        unit = int(left[units].sum(1).masked_fill(~free, -torch.inf).argmax())
        columns = units[unit]
        rest = gram[columns] - factor[:rank, columns].T @ factor[:rank]  # [W, K]
        values, vectors = torch.linalg.eigh(rest[:, columns])
        real = values > noise  # a unit may be a combination of itself or of others
        new = (vectors[:, real] / values[real].sqrt()).T @ rest
        factor[rank : rank + len(new)] = new
        rank += len(new)
        left = (left - new.square().sum(0)).clamp_min(0)
        left[columns] = 0
        free[unit] = False
        order.append(unit)
        errors.append((float(left.sum()) / total) ** 0.5 if total else 0.0)
    return torch.tensor(order), torch.tensor(errors, dtype=torch.float64)


def interpolation(gram: torch.Tensor, kept: torch.Tensor, ridge: float) -> torch.Tensor:
    """T [K', K] with A ≈ A[:, kept] T by least squares: (G_kk + λ I)⁻¹ G_k:, λ = ridge · mean diagonal of G."""
    rows = gram[kept]
    damp = ridge * float(gram.diagonal().mean())
    if not damp:  # nothing was active: there is nothing to fit
        return selection(gram, kept)
    inner = rows[:, kept].clone()
    inner.diagonal().add_(damp)
    lower, failed = torch.linalg.cholesky_ex(inner)
    if failed:
        raise SmeltError(f"a ridge of {ridge} leaves the fit singular; take a larger one")
    return torch.cholesky_solve(rows, lower)


def selection(gram: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """T [K', K] of no correction: what is not kept counts as zero."""
    chosen = gram.new_zeros(len(kept), gram.shape[0])
    chosen[torch.arange(len(kept)), kept] = 1
    return chosen


def unexplained(gram: torch.Tensor, kept: torch.Tensor, t: torch.Tensor) -> float:
    """‖A - A[:, kept] T‖ / ‖A‖."""
    total = gram.diagonal().sum()
    left = total - 2 * (t * gram[kept]).sum() + ((gram[kept][:, kept] @ t) * t).sum()
    return float((left.clamp_min(0) / total).sqrt()) if total else 0.0


def gram_of(walk: Walk, consumer: fx.Node) -> torch.Tensor:
    """XᵀX float64 [K, K] of what a product reads [..., K], over all tokens of the samples."""
    size = walk.program.weights[str(arguments(consumer)["weight"].target)].shape[1]
    gram = torch.zeros(size, size, dtype=torch.float64)
    for (value,) in walk.values(arguments(consumer)["x"]):
        x = value.reshape(-1, size).double()
        gram.addmm_(x.T, x)
    return gram
