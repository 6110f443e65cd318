"""ONNX losses over classes in axis 1."""

from __future__ import annotations

import torch

from ....errors import SmeltError
from ..registry import Tensor, op


@op("NegativeLogLikelihoodLoss")
def nll_loss(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    """-x at the target class, weighed by class; a mean is over the weights that count."""
    keep = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
    at = torch.where(keep, target, 0).to(torch.int64)
    share = torch.ones(target.shape, dtype=x.dtype) if weight is None else weight[at]
    share = torch.where(keep, share, torch.zeros_like(share))
    loss = -torch.gather(x, 1, at.unsqueeze(1)).squeeze(1) * share
    if reduction == "none":
        return loss
    if reduction not in ("mean", "sum"):
        raise SmeltError(f"no loss reduction {reduction!r}; there are none, mean and sum")
    return loss.sum() / share.sum() if reduction == "mean" else loss.sum()


@op("SoftmaxCrossEntropyLoss")
def softmax_cross_entropy_loss(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """The loss of log_softmax(x), and that log_softmax."""
    log_prob = torch.log_softmax(x, 1)
    return nll_loss(log_prob, target, weight, ignore_index=ignore_index, reduction=reduction), log_prob
