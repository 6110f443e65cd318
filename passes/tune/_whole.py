"""What a model's own weights learn from: the laws of the model that a recipe began with, or the text itself."""

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
from ._learned import Learned

LIKELY = 64  # tokens of the teacher's law that count; what is left of it is left out


@dataclass(frozen=True)
class Whole:
    """A `Learner` of all of a program: cross-entropy with a teacher's law or with the text, and distances of states.

    learn, held: the teacher's answers for windows [N, L]. text: share of the loss that is with the text. hidden: weight
    of the mean squared distance of the states in front of the head, relative to the teacher's mean square.
    """

    learn: Frozen
    held: Frozen
    learned: Learned
    head: Head
    text: float
    hidden: float

    @classmethod
    def of(
        cls, teacher: Program, learned: Learned, learn: torch.Tensor, held: torch.Tensor, text: float, hidden: float
    ) -> Whole:
        """Of programs whose logits come from a head; that of what learns is cut off."""
        frozen = trunk(teacher, {"logits": teacher.outputs["logits"], "state": _state(teacher)})
        part = learned.part
        for node in part.calls(QUANTIZED):
            node.target = _straight
        head, state = Head.of(part, part.outputs["logits"]), _state(part)
        end(part, {"state": state})
        return cls(Frozen(frozen, learn, _said), Frozen(frozen, held, _said), learned, head, text, hidden)

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
        tokens, said = text.tokens[windows], text.at(windows)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        state = interpret(self.learned.part, {"tokens": tokens, "positions": positions})["state"]
        total = torch.zeros(())
        if self.text < 1:
            laws = said["likely"].flatten(0, 1), said["shares"].flatten(0, 1)
            total = total + (1 - self.text) * self.head.entropy_with(state.flatten(0, 1), *laws).mean()
        if self.text > 0:
            entropy = self.head.entropy(state[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            total = total + self.text * entropy.mean()
        if self.hidden:
            size = said["state"].square().mean()
            total = total + self.hidden * functional.mse_loss(state, said["state"]) / size
        return total


def _state(program: Program) -> fx.Node:
    """What the head reads."""
    node: fx.Node = arguments(program.outputs["logits"])["x"]
    return node


def _said(outputs: Outputs) -> Outputs:
    """What is kept of a window: the likeliest tokens with their shares, and the state."""
    likely = outputs["logits"].topk(min(LIKELY, outputs["logits"].shape[-1]), -1)
    return {"likely": likely.indices, "shares": likely.values.softmax(-1), "state": outputs["state"]}


def _straight(x: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Rounded activations, through which gradients go as if they were not."""
    return x + (QUANTIZED.reference(x, bits, group) - x).detach()
