"""Which weights leave a matrix: a share of every row or of the whole, or all but a few of every group of neighbours.

SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot (Frantar and Alistarh, 2023, arXiv 2301.00774,
algorithm 1): masks are chosen a block of columns at a time, and later columns make up for what earlier ones lose.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..weights._gptq import BLOCK, inverse_factor, sweep


@dataclass(frozen=True)
class Pattern:
    """`keep` of every `of` neighbours in a row; with no `of`, all but a `share` of each row, or of the whole matrix."""

    share: float = 0.5
    rows: bool = True
    keep: int = 0
    of: int = 0

    def removed(self, score: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Where the least scores are, bool like score [N, k], the columns from `start` of a matrix."""
        if self.of:
            units, count = score.unflatten(1, (-1, self.of)), self.of - self.keep
        else:
            units, each = (score, 1) if self.rows else (score.reshape(1, -1), len(score))
            ends = start, start + score.shape[1]  # so that the blocks of a row lose its share together
            first, last = (round(self.share * each * end) for end in ends)
            count = last - first
        least = units.topk(count, -1, largest=False).indices
        return torch.zeros_like(units, dtype=torch.bool).scatter_(-1, least, True).view_as(score)


def compensated(
    weight: torch.Tensor, hessian: torch.Tensor, pattern: Pattern, damp: float
) -> tuple[torch.Tensor, float]:
    """The matrix float32 [N, K] with zeros that the other weights make up for, and the damping that it took.

    hessian: second moments float64 [K, K] of its inputs. Raises SmeltError where no damping mends them.
    """
    upper, damped = inverse_factor(hessian, damp)
    left = weight.masked_fill(hessian.diagonal() == 0, 0.0)
    spread, step = upper.diagonal(), pattern.of or BLOCK
    removed = torch.zeros(len(left), step, dtype=torch.bool)

    def cut(part: torch.Tensor, start: int, i: int) -> torch.Tensor:
        nonlocal removed
        if i % step == 0:
            ahead = part[:, i : i + step]
            removed = pattern.removed((ahead / spread[start + i :][: ahead.shape[1]]).abs(), start + i)
        return part[:, i : i + 1].masked_fill(removed[:, i % step, None], 0.0)

    sweep(left, upper, BLOCK, cut)
    return left, damped
