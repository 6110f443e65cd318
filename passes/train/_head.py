"""The vocabulary head behind what is trained, cut off so that an update holds the logits of a few tokens alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ...ir.ops import HEAD, arguments
from ...ir.ops.loss import HEAD_CROSS_ENTROPY
from ...ir.program import Program
from ...ir.weight import Weight
from ._split import end

LIKELY = 8  # tokens of a law that are learned; what is left of it is left out


@dataclass(frozen=True)
class Head:
    """A projection to the vocabulary: weight [V, K] and perhaps bias [V]. One that is trained is read as it stands."""

    weight: Weight
    bias: Weight | None

    @classmethod
    def of(cls, program: Program, node: fx.Node) -> Head:
        """That of a `smelt.head` node."""
        a = arguments(node)
        bias = None if a["bias"] is None else program.weights[str(a["bias"].target)]
        return cls(program.weights[str(a["weight"].target)], bias)

    def decoded(self) -> Head:
        """The same with weights that need no decoding."""
        weight, bias = self._dense()
        return Head(Weight.of(weight), None if bias is None else Weight.of(bias))

    def logits(self, state: torch.Tensor) -> torch.Tensor:
        """[..., V] behind states [..., K]."""
        out: torch.Tensor = HEAD.reference(state, *self._dense())
        return out

    def entropy(self, state: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The cross-entropy [N] in nats behind states [N, K] with one token each, int64 [N]."""
        weight, bias = self._dense()
        out: torch.Tensor = HEAD_CROSS_ENTROPY.target(state, weight, tokens, bias)
        return out

    def entropy_with(
        self, state: torch.Tensor, tokens: torch.Tensor, shares: torch.Tensor, *, rest: bool = False
    ) -> torch.Tensor:
        """The cross-entropy [N] in nats behind states [N, K] with laws over a few tokens each, [N, k].

        rest: what the shares lack of 1 is that of all other tokens together, which count as one more.
        """
        weight, bias = self._dense()
        scores = (weight[tokens] @ state[..., None])[..., 0]
        if bias is not None:
            scores = scores + bias[tokens]
        whole = self.entropy(state, tokens[:, 0].contiguous()) + scores[:, 0]  # log Σ exp over the vocabulary
        found = whole - (shares * scores).sum(-1)
        if not rest:
            return found
        left = 1 - shares.sum(-1)
        named = (scores.logsumexp(-1) - whole).clamp_max(-1e-6)  # log of what the few tokens have
        return found - left * (whole + named.expm1().neg().log())

    def _dense(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.weight.dense(), None if self.bias is None else self.bias.dense()


def cut(part: Program, *kept: str) -> Head:
    """Take the one head off a program, whose outputs become the `state` that it reads and those named; give the head.

    The head is decoded: it is not what is trained.
    """
    (node,) = part.calls(HEAD)
    head = Head.of(part, node).decoded()
    end(part, {"state": arguments(node)["x"], **{name: part.outputs[name] for name in kept}})
    return head


def law(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest tokens [..., k] of logits [..., V], best first, and their shares among themselves."""
    likely = logits.topk(min(LIKELY, logits.shape[-1]), -1)
    return likely.indices, likely.values.softmax(-1)
