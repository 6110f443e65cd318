"""What decoding heads are trained and judged on: their guesses for a text beside the tokens that really came."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx
from torch.nn import functional

from ...ir.interpret import interpret
from ...ir.program import Program
from ...ir.weight import Weight
from ._split import branch, trunk

AT_ONCE = 16  # windows whose guesses are held in memory when heads are measured


@dataclass(frozen=True)
class Score:
    """How good heads are on a text: `loss` in nats, summed over heads, and `hits[j][r]`, how often rank r is right."""

    loss: float
    hits: tuple[tuple[float, ...], ...]

    def to_dict(self) -> dict[str, object]:
        """The note of a report: loss, and for each head how often its best guess is right, and any of its guesses."""
        return {
            "loss": round(self.loss, 4),
            "top1": [round(ranks[0], 4) for ranks in self.hits],
            f"top{len(self.hits[0])}": [round(sum(ranks), 4) for ranks in self.hits],
        }


@dataclass(frozen=True)
class Drill:
    """A Program cut at the hidden state that its heads read, and the heads' weights in float32, ready for gradients."""

    trunk: Program
    branch: Program
    weights: Mapping[str, torch.Tensor]
    heads: int
    decay: float

    @classmethod
    def of(cls, program: Program, decay: float) -> Drill:
        """The drill of a Program that has the output `heads`; its own weights stay as they are."""
        names = trained(program)
        weights = {name: program.weights[name].dense().clone().requires_grad_() for name in names}
        hidden = program.uses(names[0])[0].args[0]
        assert isinstance(hidden, fx.Node)
        part = branch(program, hidden, "heads")
        part.weights |= {name: replace(Weight.of(value), parts={"data": value}) for name, value in weights.items()}
        heads = sum(name.endswith(".block.weight") for name in names)
        return cls(trunk(program, hidden), part, weights, heads, decay)

    def guesses(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [N, P, J, V] and the tokens that came, [N, P, J], for windows of text [N, L] with P = L - J - 1.

        Head j at place t guesses token t + j + 2: the model's own head guesses t + 1.
        """
        rows, length = tokens.shape
        positions = torch.arange(length).expand(rows, -1)
        with torch.no_grad():
            hidden = interpret(self.trunk, {"tokens": tokens, "positions": positions})["hidden"]
        logits = interpret(self.branch, {"hidden": hidden[:, : length - self.heads - 1]})["heads"]
        return logits, tokens[:, 2:].unfold(1, self.heads, 1)

    def loss(self, logits: torch.Tensor, came: torch.Tensor) -> torch.Tensor:
        """Cross-entropy in nats, the mean over places of Σ_j decay^j · entropy_j."""
        entropy = functional.cross_entropy(logits.flatten(0, 2), came.flatten(), reduction="none")
        factors = self.decay ** torch.arange(self.heads)
        return (entropy.view(-1, self.heads).mean(0) * factors).sum()

    @torch.no_grad()
    def measure(self, tokens: torch.Tensor, width: int) -> Score:
        """The score over windows [N, L], with hit rates of the first `width` ranks."""
        total, ranks = 0.0, []
        for part in tokens.split(AT_ONCE):
            logits, came = self.guesses(part)
            total += self.loss(logits, came).item() * len(part) / len(tokens)
            ranks.append((logits > logits.gather(-1, came[..., None])).sum(-1))
        places = torch.cat(ranks)
        hits = [(places == rank).double().mean((0, 1)).tolist() for rank in range(width)]
        return Score(total, tuple(zip(*hits, strict=True)))


def trained(program: Program) -> list[str]:
    """Names of the heads' own weights, in order; the first is a residual block's."""
    return sorted(name for name in program.weights if name.startswith("heads."))
