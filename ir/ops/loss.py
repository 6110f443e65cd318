"""Cross-entropy of a vocabulary head that never holds all logits (Cut Your Losses in Large-Vocabulary LMs, 2024).

The reference writes the formula down. What torch.library runs goes over the vocabulary in blocks, forward and backward,
and computes the logits of a block a second time for the gradients: memory grows with N · K and V · K, not with N · V.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch.nn import functional

from .registry import Cost, Shape, define

NARROW = 256  # logits of a token held at once, or as many as the token has features


def head_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    ignore: int = -100,
) -> torch.Tensor:
    """-log softmax(x Wᵀ + b)[label] in float32; x [N, K], weight [V, K], labels [N] int64, bias [V] → [N].

    `softcap` c: logits become c · tanh(logits / c). A token whose label is `ignore` has no loss and no gradient.
    """
    logits = functional.linear(x.float(), weight.float(), bias if bias is None else bias.float())
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return functional.cross_entropy(logits, labels, reduction="none", ignore_index=ignore)


def _shape(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return x.new_empty(labels.shape, dtype=torch.float32)


def _cost(x: Shape, weight: Shape, labels: Shape, *_: Any, **__: Any) -> Cost:
    return Cost(flops=x[0] * weight[0] * (2 * weight[1] + 3))  # a maximum, an exponential and a sum each logit


HEAD_CROSS_ENTROPY = define(head_cross_entropy, _shape, _cost)


class Kernels(Protocol):
    """What computes the op faster than blocks of torch ops do. Labels of tokens without a loss are -1 here."""

    def covers(self, x: torch.Tensor, weight: torch.Tensor) -> str | None:
        """Why these operands have no kernel, or None."""
        ...

    def loss(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        bias: torch.Tensor | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """The loss of each token, float32 [N]; 0 where there is none."""
        ...

    def gradients(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        bias: torch.Tensor | None,
        softcap: float | None,
        logsum: torch.Tensor,
        grad: torch.Tensor,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Of x, weight and bias, those `wanted`; `logsum` float32 [N], inf where a token has no loss."""
        ...


KERNELS: dict[str, Kernels] = {}  # by type of device: whoever has kernels puts them here


def cut(
    x: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    ignore: int = -100,
) -> torch.Tensor:
    """`head_cross_entropy` as log-sum-exp over blocks minus the label's logit."""
    kernels = KERNELS.get(x.device.type)
    if kernels is not None and kernels.covers(x, weight) is None:
        return kernels.loss(x, weight, labels.masked_fill(labels == ignore, -1), bias, softcap)
    most = x.new_full(labels.shape, float("-inf"), dtype=torch.float32)
    total = torch.zeros_like(most)
    for _, logits in _blocks(x, weight, bias, softcap):
        peak = torch.maximum(most, logits.amax(1))
        total = total * (most - peak).exp_() + logits.sub_(peak[:, None]).exp_().sum(1)
        most = peak
    loss = most + total.log_() - _of_labels(x, weight, labels, bias, softcap, ignore)
    return loss.masked_fill_(labels == ignore, 0.0)


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Gradients of x, weight and bias: (softmax - one-hot) · grad, block by block."""
    x, weight, labels, bias, loss = ctx.saved_tensors
    ignored = labels == ctx.ignore
    # the log-sum-exp is not an output, but loss and label give it back; at infinity a token has no share anywhere
    logsum = (loss + _of_labels(x, weight, labels, bias, ctx.softcap, ctx.ignore)).masked_fill_(ignored, float("inf"))
    grad, wide = grad.float().masked_fill(ignored, 0.0), x.float()
    of_x, of_weight = ctx.needs_input_grad[:2]
    of_bias = bias is not None and ctx.needs_input_grad[3]  # a bias left out is not in the list
    kernels = KERNELS.get(x.device.type)
    if kernels is not None and kernels.covers(x, weight) is None:
        known, asked = labels.masked_fill(ignored, -1), (of_x, of_weight, of_bias)
        found = kernels.gradients(x, weight, known, bias, ctx.softcap, logsum, grad, asked)
        return found[0], found[1], None, found[2], None, None
    dx = torch.zeros_like(wide) if of_x else None
    dweight = torch.empty_like(weight) if of_weight else None
    dbias = torch.empty_like(bias) if of_bias else None
    for part, logits in _blocks(x, weight, bias, ctx.softcap):
        slope = None if ctx.softcap is None else 1 - (logits / ctx.softcap).square_()
        share = logits.sub_(logsum[:, None]).exp_()
        (rows,) = torch.where((labels >= part.start) & (labels < part.stop) & ~ignored)
        share[rows, labels[rows] - part.start] -= 1
        share.mul_(grad[:, None])
        if slope is not None:
            share.mul_(slope)
        if dx is not None:
            dx.addmm_(share, weight[part].float())
        if dweight is not None:
            dweight[part] = share.mT @ wide
        if dbias is not None:
            dbias[part] = share.sum(0)
    return None if dx is None else dx.to(x.dtype), dweight, None, dbias, None, None


def _blocks(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, softcap: float | None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Spans of the vocabulary and their logits, float32; a block of logits is no larger than x, or NARROW wide."""
    wide, width = x.float(), max(NARROW, x.shape[1])
    for start in range(0, weight.shape[0], width):
        part = slice(start, min(start + width, weight.shape[0]))
        logits = functional.linear(wide, weight[part].float(), bias if bias is None else bias[part].float())
        yield part, logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _of_labels(
    x: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    ignore: int,
) -> torch.Tensor:
    """The logit of each token's label, [N]."""
    rows = labels.masked_fill(labels == ignore, 0)
    logits = (x.float() * weight.index_select(0, rows).float()).sum(1)
    if bias is not None:
        logits += bias.index_select(0, rows).float()
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, labels, bias, ctx.softcap, ctx.ignore = inputs
    ctx.save_for_backward(x, weight, labels, bias, output)


torch.library.impl("smelt::head_cross_entropy", ("cpu", "cuda"), cut)
torch.library.register_autograd("smelt::head_cross_entropy", _gradients, setup_context=_setup)
