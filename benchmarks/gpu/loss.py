"""Cross-entropy of a vocabulary head, forward and backward: without its logits, against torch and two packages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.nn import functional

from smelt.codegen.loss_triton import FILTER, TritonLoss

from .contest import Bar, Contest, Entry, Makers, Outputs, Run, Settings, apart

SHAPES = ((8192, 128256, 2048), (2048, 32000, 4096))  # tokens, vocabulary, features
TINY = ((37, 129, 32),)
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}  # length of the difference; filtered entries are below it
BLOCK = 512  # tokens whose logits the reference holds at once
SLACK = 1 << 25  # bytes for sums by token and block

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # mean loss of x [N, K] and weight [V, K]


def contests(settings: Settings) -> Iterator[Contest]:
    """Loss and both gradients."""
    for n, v, k in TINY if settings.tiny else SHAPES:
        bar = Bar("smelt filtered", 1.0, ("cut-cross-entropy",)) if v == 128256 else None
        label = f"loss and gradients, {n} tokens, {v} words of {k}"
        prepare = partial(_prepare, settings, n, v, k)
        yield Contest(label, TOLERANCE[settings.half], prepare, apart, bar, memory=True)


def _prepare(settings: Settings, n: int, v: int, k: int) -> Makers:
    """Labels are likely but not certain, as in training: random ones would leave nothing that a filter keeps."""
    weight = torch.randn(v, k, device=settings.device) / k**0.5
    labels = torch.randint(v, (n,), device=settings.device)
    x = torch.randn(n, k, device=settings.device) + math.log(v) * weight[labels]
    x, weight = (each.to(settings.half).requires_grad_() for each in (x, weight))
    right = _exact(x.detach(), weight.detach(), labels)
    size = x.element_size()
    nbytes, flops = 2 * size * (n + v) * k, 6.0 * n * v * k  # operands and gradients; logits and two products of theirs
    room = (4 + size) * (n + v) * k + SLACK

    def entry(loss: Loss, room: float | None = None, checked: bool = False) -> Entry:
        wrong = _step(lambda a, b: loss(a * 1.05, b), x, weight) if checked else None
        return Entry(_step(loss, x, weight), right, wrong, nbytes, flops, room=room)

    def ours(least: float) -> Entry:
        kernels = TritonLoss(least)
        return entry(lambda a, b: kernels(a, b, labels).mean(), room, True)

    makers: dict[str, Callable[[], Entry]] = {"smelt": partial(ours, 0.0), "smelt filtered": partial(ours, FILTER)}
    if settings.rivals:
        makers |= {
            "cut-cross-entropy": lambda: entry(_cut(labels)),
            "liger-kernel": lambda: entry(_liger(labels)),
            "torch": lambda: entry(partial(_eager, labels=labels)),
            "torch compiled": lambda: entry(torch.compile(partial(_eager, labels=labels), dynamic=False)),
        }
    return makers


def _step(loss: Loss, x: torch.Tensor, weight: torch.Tensor) -> Run:
    def run() -> Outputs:
        value = loss(x, weight)
        return (value.detach(), *torch.autograd.grad(value, (x, weight)))

    return run


def _eager(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(functional.linear(x, weight).float(), labels)


def _cut(labels: torch.Tensor) -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    def loss(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = linear_cross_entropy(x, weight, labels)
        return value

    return loss


def _liger(labels: torch.Tensor) -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    module = LigerFusedLinearCrossEntropyLoss()

    def loss(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = module(weight, x, labels)
        return value

    return loss


def _exact(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> Outputs:
    """Mean loss and its gradients in float64, a block of tokens at a time."""
    wide = weight.double()
    loss, dx, dweight = 0.0, [], torch.zeros_like(wide)
    for rows, named in zip(x.split(BLOCK), labels.split(BLOCK), strict=True):
        some = rows.double()
        logs = torch.log_softmax(some @ wide.t(), -1)
        loss -= float(logs.gather(1, named[:, None]).sum())
        shares = logs.exp_()
        shares[torch.arange(len(rows), device=x.device), named] -= 1
        shares /= len(x)
        dx.append(shares @ wide)
        dweight += shares.t() @ some
    return torch.tensor(loss / len(x), device=x.device, dtype=torch.float64), torch.cat(dx), dweight
