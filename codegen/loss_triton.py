"""Cross-entropy of a vocabulary head on a GPU, in Triton, without its logits (Cut Your Losses, 2024, arXiv 2411.09009).

Deviations from the paper: the label's logit is taken from the blocks of the log-sum-exp, not by a product of its own;
gradients of x and of the weight come from two walks over the logits, each owning what it adds to, where the paper takes
locks in one (twice the products that make logits again, and the same bits in every run); the vocabulary is not sorted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..ir.errors import SmeltError
from .loss_triton_template import KERNELS
from .triton_module import load

FILTER = 2.0**-12  # the paper's threshold: in bfloat16 smaller shares add nothing to a sum of size 1
PROGRAMS = 264  # two on each multiprocessor of an H100: the forward pass parts the vocabulary to reach them
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


@dataclass(frozen=True)
class Tile:
    """Tokens, words of the vocabulary and columns of a step (powers of two from 16 on), warps and stages.

    The backward kernels hold a product beside the shares: with 128 x 128 they spill on sm_90 (triton 3.9).
    """

    tokens: int = 64
    words: int = 128
    columns: int = 32
    warps: int = 8
    stages: int = 3


# forward and backward, by bytes of an operand
SMALL = Tile(tokens=64, words=64, columns=16, stages=2)
TILES = {2: (Tile(tokens=128), Tile()), 4: (SMALL, SMALL)}


def covers(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Why these operands have no kernel, or None."""
    if x.dtype not in POINTERS or weight.dtype != x.dtype:
        return f"x and weight must share one of float32, float16 and bfloat16, not {x.dtype} and {weight.dtype}"
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        return f"x [N, K] and weight [V, K] are needed, not {list(x.shape)} and {list(weight.shape)}"
    return None


class TritonLoss:
    """`smelt::head_cross_entropy` with gradients, where memory is that of x, weight and their gradients in float32.

    `least`: blocks of logits in which no entry of softmax - one-hot reaches it add nothing to the gradients of x and
    weight. 0 skips nothing and is exact; FILTER is the paper's.
    """

    def __init__(self, least: float = 0.0, tile: Tile | None = None) -> None:
        self.least, self.tile = least, tile
        self.kernels = load(KERNELS, "loss")

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        bias: torch.Tensor | None = None,
        softcap: float | None = None,
        ignore: int = -100,
    ) -> torch.Tensor:
        """The loss of each token, float32 [N], as `head_cross_entropy` means it; labels are not checked for range."""
        if why := covers(x, weight):
            raise SmeltError(f"head_cross_entropy: no kernel on this target: {why}")
        known = labels.masked_fill(labels == ignore, -1)
        loss: torch.Tensor = _Cut.apply(x, weight, known, bias, softcap, self)  # type: ignore[no-untyped-call]
        return loss

    def losses(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        bias: torch.Tensor | None,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and log-sum-exp of each token; labels of tokens without a loss are -1."""
        x, weight = x.contiguous(), weight.contiguous()
        (n, k), v, options = x.shape, weight.shape[0], self.options(x, bias, softcap)
        blocks, words = -(-n // options["BN"]), -(-v // options["BV"])
        parts = max(1, min(words, PROGRAMS // max(blocks, 1)))
        span = -(-words // parts) * options["BV"]
        parts = -(-v // span)
        most, total, picked = torch.empty(3, parts, n, dtype=torch.float32, device=x.device).unbind()
        self.kernels.forward[(blocks, parts)](
            x, weight, labels, bias, most, total, picked, n, v, k, span, softcap or 0.0, **options
        )
        logsum = torch.logsumexp(most + total.log(), 0)
        return (logsum - picked.sum(0)).masked_fill(labels < 0, 0.0), logsum

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
        """Of x, weight and bias, those `wanted`; `logsum` is inf and the label -1 where a token has no loss."""
        x, weight = x.contiguous(), weight.contiguous()
        (n, k), v, options = x.shape, weight.shape[0], self.options(x, bias, softcap, backward=True)
        grad = grad.float().masked_fill(labels < 0, 0.0)
        # shares are rounded to the type of x: those of a mean over many tokens would be too small for float16
        size = grad.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        given = (x, weight, labels, bias, logsum, grad / size)
        numbers = (n, v, k, softcap or 0.0, self.least)
        dx = dweight = dbias = None
        if wanted[0]:
            dx = torch.zeros_like(x, dtype=torch.float32)
            self.kernels.backward_x[(-(-n // options["BN"]),)](*given, dx, *numbers, **options)
            dx = dx.mul_(size).to(x.dtype)
        if wanted[1] or wanted[2]:
            dweight = torch.zeros_like(weight, dtype=torch.float32)
            dbias = None if bias is None else torch.empty_like(bias, dtype=torch.float32)
            self.kernels.backward_weight[(-(-v // options["BV"]),)](*given, dweight, dbias, *numbers, **options)
            dweight = dweight.mul_(size).to(weight.dtype)
            dbias = None if bias is None or dbias is None else dbias.mul_(size).to(bias.dtype)
        return dx, dweight, dbias

    def options(
        self, x: torch.Tensor, bias: torch.Tensor | None, softcap: float | None, backward: bool = False
    ) -> dict[str, Any]:
        """What the kernels are specialised by."""
        tile = self.tile or TILES[x.element_size()][backward]
        return {
            **{"SOFTCAP": softcap is not None, "BIAS": bias is not None},
            **{"BN": tile.tokens, "BV": tile.words, "BK": tile.columns},
            **{"num_warps": tile.warps, "num_stages": tile.stages},
        }


class _Cut(torch.autograd.Function):
    """Labels of tokens without a loss are -1."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        bias: torch.Tensor | None,
        softcap: float | None,
        to: TritonLoss,
    ) -> torch.Tensor:
        loss, logsum = to.losses(x, weight, labels, bias, softcap)
        ctx.save_for_backward(x, weight, labels, bias, logsum.masked_fill(labels < 0, float("inf")))
        ctx.softcap, ctx.to = softcap, to
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, labels, bias, logsum = ctx.saved_tensors
        of_x, of_weight, _, of_bias = ctx.needs_input_grad[:4]
        wanted = of_x, of_weight, of_bias
        dx, dweight, dbias = ctx.to.gradients(x, weight, labels, bias, ctx.softcap, logsum, grads[0], wanted)
        return dx, dweight, None, dbias, None, None


def signatures(dtype: torch.dtype, bias: bool = False) -> dict[str, dict[str, str]]:
    """Triton's type of every argument of each kernel, for compiling ahead of time; the bias has the type of x."""
    pointer, floats = POINTERS[dtype], "*fp32"
    biased = pointer if bias else "constexpr"
    given = {"x": pointer, "weight": pointer, "labels": "*i64", "bias": biased}
    numbers = {**dict.fromkeys(("N", "V", "K"), "i32"), "softcap": "fp32"}
    constants = dict.fromkeys(("SOFTCAP", "BIAS", "BN", "BV", "BK"), "constexpr")
    again = {**given, "logsum": floats, "grad": floats}
    return {
        "forward": {
            **given,
            **dict.fromkeys(("most", "total", "picked"), floats),
            **numbers,
            "span": "i32",
            **constants,
        },
        "backward_x": {**again, "dx": floats, **numbers, "least": "fp32", **constants},
        "backward_weight": {
            **{**again, "dweight": floats, "dbias": floats if bias else "constexpr"},
            **{**numbers, "least": "fp32", **constants},
        },
    }
