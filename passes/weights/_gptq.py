"""Rounds a matrix column by column, each column's error being made up for by those still to come.

GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (Frantar et al., 2023, arXiv
2210.17323, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...ir.encoding import NM, Affine, Encoding
from ...ir.errors import SmeltError
from ._range import Range, Steps, fit

BLOCK = 128  # columns behind which errors are carried on at once
STRONGER, MOST = 10.0, 10.0  # by what damping grows where the Hessian is singular, and where it ends


@dataclass(frozen=True)
class Solved:
    """The parts of the matrix, the damping that its Hessian needed, and ‖(W - Q) X‖² / ‖W X‖² on the sample text.

    encoding: that of the parts, where the solver chose one.
    """

    parts: dict[str, torch.Tensor]
    damp: float
    error: float
    encoding: Encoding | None = None


def solve(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    encoding: Affine | NM,
    rule: Range,
    order: bool,
    damp: float,
    columns: torch.Tensor | None = None,
) -> Solved:
    """The matrix float32 [N, K] in `encoding`, for inputs with the second moments float64 [K, K].

    rule: how the steps of a group are fitted, to the weights as they stand when its first column comes. order: columns
    go by falling second moment; the steps are then fitted to the weights as they were. damp: share of the mean moment
    that is added to each, more where that is not enough. columns: those that N:M sparsity keeps of each row, int64; the
    others stay 0, and what is carried on to them goes further. Raises SmeltError for a Hessian that no damping mends.
    """
    count, width = weight.shape
    affine = encoding.values if isinstance(encoding, NM) else encoding
    assert isinstance(affine, Affine)
    group = affine.group * width // (columns.shape[1] if columns is not None else width) or width
    kept = torch.ones_like(weight) if columns is None else torch.zeros_like(weight).scatter_(1, columns, 1.0)
    moments = hessian.diagonal()
    turn = moments.argsort(descending=True, stable=True) if order else torch.arange(width)
    upper, damped = inverse_factor(hessian[turn][:, turn], damp)
    left = weight.masked_fill(moments == 0, 0.0)[:, turn]
    held = torch.empty(count, width, dtype=torch.uint8)
    steps: list[Steps] = []
    if order or group == width:
        steps = [fit(part, affine, rule) for part in weight.split(group, 1)]

    def rounded(part: torch.Tensor, start: int, i: int) -> torch.Tensor:
        column = int(turn[start + i])
        if len(steps) * group <= column:
            ahead = part[:, i : i + group] * kept[:, column : column + group]
            steps.append(fit(ahead, affine, rule))
        step = steps[column // group]
        held[:, column : column + 1] = found = step.codes(part[:, i : i + 1])
        return step.values(found) * kept[:, column : column + 1]

    sweep(left, upper, group * max(1, BLOCK // group) if group < width else BLOCK, rounded)
    scale = torch.cat([step.scale for step in steps], 1)
    zeros = [step.zero for step in steps if step.zero is not None]
    codes = held if columns is None else held.gather(1, columns)
    parts = affine.parts(codes, scale, torch.cat(zeros, 1) if zeros else None)
    if isinstance(encoding, NM) and columns is not None:
        parts = encoding.parts(columns, parts)
    return Solved(parts, damped, lost(weight, encoding.decode(parts, (count, width)), hessian))


def sweep(
    left: torch.Tensor, upper: torch.Tensor, block: int, value: Callable[[torch.Tensor, int, int], torch.Tensor]
) -> None:
    """Replace the columns of a matrix float32 [N, K] one by one, in place; later ones make up for what each loses.

    upper: the factor of the inverse Hessian. value(part, start, i): what column `i` becomes, [N, 1], of the block of
    columns `part` that begins at `start`; all as they stand then.
    """
    for start in range(0, left.shape[1], block):
        part = left[:, start : start + block]  # a view: what is done to it stays
        factor = upper[start : start + block, start : start + block]
        errors = torch.empty_like(part)
        for i in range(part.shape[1]):
            found = value(part, start, i)
            errors[:, i : i + 1] = (part[:, i : i + 1] - found) / factor[i, i]
            part[:, i + 1 :].addmm_(errors[:, i : i + 1], factor[i : i + 1, i + 1 :], alpha=-1)
            part[:, i : i + 1] = found
        left[:, start + block :].addmm_(errors, upper[start : start + block, start + block :], alpha=-1)


def inverse_factor(hessian: torch.Tensor, damp: float) -> tuple[torch.Tensor, float]:
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


def lost(weight: torch.Tensor, value: torch.Tensor, hessian: torch.Tensor) -> float:
    """‖(W - Q) X‖² / ‖W X‖² for inputs with these second moments."""
    rest, whole = (weight - value).double(), weight.double()
    signal = float(((whole @ hessian) * whole).sum())
    return float(((rest @ hessian) * rest).sum()) / signal if signal else 0.0
