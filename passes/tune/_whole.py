"""What a model's own weights learn from: the answers and the insides of the model that a recipe began with, or text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx
from torch.nn import functional

from ...ir.interpret import interpret
from ...ir.ops import QUANTIZED, arguments
from ...ir.program import Program
from ..train._frozen import Frozen, Outputs
from ..train._head import Head
from ..train._split import end, trunk
from ._attention import distance, maps, narrowness, vectors
from ._learned import Learned

LIKELY = 64  # tokens of the teacher's law that count by themselves; all others count as one


@dataclass(frozen=True)
class Whole:
    """A `Learner` of all of a program: cross-entropy with a teacher's law or with the text, and what is inside.

    learn, held: the teacher's answers for windows [N, L]. text: share of the loss that is with the text. hidden: weight
    of the mean squared distance of the states in front of the head, relative to the teacher's mean square. attention,
    entropy: weights of `distance` and `narrowness`.
    """

    learn: Frozen
    held: Frozen
    learned: Learned
    head: Head
    text: float
    hidden: float
    attention: float = 0.0
    entropy: float = 0.0

    @classmethod
    def of(
        cls,
        teacher: Program,
        learned: Learned,
        learn: torch.Tensor,
        held: torch.Tensor,
        text: float,
        hidden: float = 0.0,
        attention: float = 0.0,
        entropy: float = 0.0,
    ) -> Whole:
        """Of programs whose logits come from a head; that of what learns is cut off."""
        teacher, part = teacher.fork(), learned.part
        wanted = {"logits": teacher.outputs["logits"], "state": _state(teacher)}
        frozen = trunk(teacher, {**wanted, **(maps(teacher) if attention else {})})
        for node in part.calls(QUANTIZED):
            node.target = _straight
        head, outputs = Head.of(part, part.outputs["logits"]), {"state": _state(part)}
        if attention:
            outputs |= maps(part)
        if entropy:
            outputs |= vectors(part)
        end(part, outputs)
        texts = Frozen(frozen, learn, _said), Frozen(frozen, held, _said)
        return cls(*texts, learned, head, text, hidden, attention, entropy)

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        """The leaves."""
        return self.learned.leaves

    def loss(self, windows: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
        """The mean over places, in nats."""
        return self._loss(self.learn, windows)

    @torch.no_grad()
    def check(self) -> float:
        """The same on the windows that are held out."""
        return self.held.mean(lambda part: self._loss(self.held, part))

    def _loss(self, text: Frozen, windows: torch.Tensor) -> torch.Tensor:
        tokens = text.tokens[windows]
        said = text.at(windows) if self.text < 1 or self.hidden or self.attention else {}
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        made = interpret(self.learned.part, {"tokens": tokens, "positions": positions})
        state = made["state"]
        total = torch.zeros(())
        if self.text < 1:
            laws = said["likely"].flatten(0, 1), said["shares"].flatten(0, 1)
            total = total + (1 - self.text) * self.head.entropy_with(state.flatten(0, 1), *laws, rest=True).mean()
        if self.text > 0:
            entropy = self.head.entropy(state[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            total = total + self.text * entropy.mean()
        if self.hidden:
            size = said["state"].square().mean()
            total = total + self.hidden * functional.mse_loss(state, said["state"]) / size
        if self.attention:
            total = total + self.attention * distance(_only(made, "map"), _only(said, "map"))
        if self.entropy:
            total = total + self.entropy * narrowness(_only(made, "query", "key").values())
        return total


def _state(program: Program) -> fx.Node:
    """What the head reads."""
    node: fx.Node = arguments(program.outputs["logits"])["x"]
    return node


def _said(outputs: Outputs) -> Outputs:
    """What is kept of a window: the likeliest tokens with their shares, the state, and maps of attention."""
    logits = outputs["logits"]
    likely = logits.topk(min(LIKELY, logits.shape[-1]), -1)
    shares = (likely.values - logits.logsumexp(-1, keepdim=True)).exp()
    return {"likely": likely.indices, "shares": shares, **_only(outputs, "state", "map")}


def _only(outputs: Outputs, *kinds: str) -> Outputs:
    """Those of some kinds, which is what stands before a number."""
    return {name: value for name, value in outputs.items() if name.partition("_")[0] in kinds}


def _straight(x: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Rounded activations, through which gradients go as if they were not."""
    return x + (QUANTIZED.reference(x, bits, group) - x).detach()
