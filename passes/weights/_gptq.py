"""Rounds a matrix column by column, each column's error being made up for by those still to come.

GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (Frantar et al., 2023, arXiv
2210.17323, algorithm 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...ir.encoding import Affine
from ...ir.errors import SmeltError
from ._range import Range, Steps, fit

BLOCK = 128  # columns behind which errors are carried on at once
STRONGER, MOST = 10.0, 10.0  # by what damping grows where the Hessian is singular, and where it ends


@dataclass(frozen=True)
class Solved:
    """The parts of the matrix, the damping that its Hessian needed, and ‖(W - Q) X‖² / ‖W X‖² on the sample text."""

    parts: dict[str, torch.Tensor]
    damp: float
    error: float


def solve(
    weight: torch.Tensor, hessian: torch.Tensor, encoding: Affine, rule: Range, order: bool, damp: float
) -> Solved:
    """The matrix float32 [N, K] in `encoding`, for inputs with the second moments float64 [K, K].

    rule: how the steps of a group are fitted, to the weights as they stand when its first column comes. order: columns
    go by falling second moment; the steps are then fitted to the weights as they were. damp: share of the mean moment
    that is added to each, more where that is not enough. Raises SmeltError for a Hessian that no damping mends.
    """
    count, width = weight.shape
    group = encoding.group or width
    moments = hessian.diagonal()
    turn = moments.argsort(descending=True, stable=True) if order else torch.arange(width)
    upper, damped = _upper(hessian[turn][:, turn], damp)
    left = weight.masked_fill(moments == 0, 0.0)[:, turn]
    held = torch.empty(count, width, dtype=torch.uint8)
    steps: list[Steps] = []
    if order or group == width:
        steps = [fit(part, encoding, rule) for part in weight.split(group, 1)]
    block = group * max(1, BLOCK // group) if group < width else BLOCK
    for start in range(0, width, block):
        part = left[:, start : start + block]  # a view: what is done to it stays
        factor = upper[start : start + block, start : start + block]
        errors = torch.empty_like(part)
        for i in range(part.shape[1]):
            column = int(turn[start + i])
            if len(steps) * group <= column:
                steps.append(fit(part[:, i : i + group].contiguous(), encoding, rule))
            step = steps[column // group]
            found = step.codes(part[:, i : i + 1])
            held[:, column : column + 1] = found
            errors[:, i : i + 1] = (part[:, i : i + 1] - step.values(found)) / factor[i, i]
            part[:, i + 1 :].addmm_(errors[:, i : i + 1], factor[i : i + 1, i + 1 :], alpha=-1)
        left[:, start + block :].addmm_(errors, upper[start : start + block, start + block :], alpha=-1)
    scale = torch.cat([step.scale for step in steps], 1)
    zeros = [step.zero for step in steps if step.zero is not None]
    parts = encoding.parts(held, scale, torch.cat(zeros, 1) if zeros else None)
    return Solved(parts, damped, _error(weight, encoding.decode(parts, (count, width)), hessian))


def _upper(hessian: torch.Tensor, damp: float) -> tuple[torch.Tensor, float]:
    """U float32 with UᵀU the inverse of the damped Hessian, and the damping."""
    idle = hessian.diagonal() == 0
    mean = float(hessian.diagonal().mean()) or 1.0
    while damp <= MOST:
        damped = hessian.clone()
        damped.diagonal().add_(damp * mean).masked_fill_(idle, mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and bool(upper.isfinite().all()):
                return upper.float(), damp
        damp = max(damp * STRONGER, 1e-6)
    raise SmeltError(f"the second moments of its inputs stay singular with a damping of {MOST:g}; give more text")


def _error(weight: torch.Tensor, value: torch.Tensor, hessian: torch.Tensor) -> float:
    rest, whole = (weight - value).double(), weight.double()
    signal = float(((whole @ hessian) * whole).sum())
    return float(((rest @ hessian) * rest).sum()) / signal if signal else 0.0
