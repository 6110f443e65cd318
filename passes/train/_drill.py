"""What decoding heads are trained and judged on: their guesses for a text beside the tokens that really came."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from ...ir.errors import SmeltError
from ...ir.interpret import interpret
from ...ir.ops import HEAD, arguments, is_op
from ...ir.ops.loss import HEAD_CROSS_ENTROPY
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
class Projection:
    """A head's way to the vocabulary: weight [V, K] and perhaps bias [V]."""

    weight: Weight
    bias: Weight | None

    def dense(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Both decoded; what is trained is itself, so that gradients reach it."""
        return self.weight.dense(), None if self.bias is None else self.bias.dense()


@dataclass(frozen=True)
class Drill:
    """A Program cut at the hidden state that its heads read, and the heads' weights in float32, ready for gradients.

    The branch ends in front of the projections to the vocabulary: the loss takes them, so that no update holds logits.
    """

    trunk: Program
    branch: Program
    projections: tuple[Projection, ...]
    weights: Mapping[str, torch.Tensor]
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
        return cls(trunk(program, hidden), part, _cut(part), weights, decay)

    @property
    def heads(self) -> int:
        """How many heads there are, J."""
        return len(self.projections)

    def guesses(self, tokens: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """What each head projects, J of [N, P, K], and the tokens that came, [N, P, J], for windows of text [N, L].

        P = L - J - 1. Head j at place t guesses token t + j + 2: the model's own head guesses t + 1.
        """
        rows, length = tokens.shape
        positions = torch.arange(length).expand(rows, -1)
        with torch.no_grad():
            hidden = interpret(self.trunk, {"tokens": tokens, "positions": positions})["hidden"]
        states = interpret(self.branch, {"hidden": hidden[:, : length - self.heads - 1]})
        return list(states.values()), tokens[:, 2:].unfold(1, self.heads, 1)

    def loss(self, states: list[torch.Tensor], came: torch.Tensor) -> torch.Tensor:
        """Cross-entropy in nats, the mean over places of Σ_j decay^j · entropy_j."""
        total = torch.zeros(())
        for j, (state, projection) in enumerate(zip(states, self.projections, strict=True)):
            weight, bias = projection.dense()
            entropy = HEAD_CROSS_ENTROPY.target(state.flatten(0, 1), weight, came[..., j].flatten(), bias)
            total = total + self.decay**j * entropy.mean()
        return total

    @torch.no_grad()
    def measure(self, tokens: torch.Tensor, width: int) -> Score:
        """The score over windows [N, L], with hit rates of the first `width` ranks."""
        total, ranks = 0.0, []
        for part in tokens.split(AT_ONCE):
            states, came = self.guesses(part)
            total += self.loss(states, came).item() * len(part) / len(tokens)
            ranks.append(torch.stack([self._rank(j, state, came[..., j]) for j, state in enumerate(states)], -1))
        places = torch.cat(ranks)
        hits = [(places == rank).double().mean((0, 1)).tolist() for rank in range(width)]
        return Score(total, tuple(zip(*hits, strict=True)))

    def _rank(self, j: int, state: torch.Tensor, came: torch.Tensor) -> torch.Tensor:
        """How many tokens head j holds for likelier than the one that came, [N, P]."""
        logits = HEAD.reference(state, *self.projections[j].dense())
        return (logits > logits.gather(-1, came[..., None])).sum(-1)


def _cut(part: Program) -> tuple[Projection, ...]:
    """Take the projections off a branch of heads; its outputs become what they project, in order."""
    stacked = part.outputs["heads"]
    found = list(stacked.all_input_nodes)
    for j, node in enumerate(found):
        if not is_op(node, HEAD):
            raise SmeltError(
                f"train.heads: head {j} must end in smelt.head to be trained, but ends in {node.name}: "
                "move train.heads right behind decode.heads"
            )
    bound = [arguments(node) for node in found]
    projections = tuple(
        Projection(part.weights[str(a["weight"].target)], a["bias"] and part.weights[str(a["bias"].target)])
        for a in bound
    )
    part.graph.erase_node(next(iter(reversed(part.graph.nodes))))
    part.graph.output({str(j): a["x"] for j, a in enumerate(bound)})
    part.prune()
    return projections


def trained(program: Program) -> list[str]:
    """Names of the heads' own weights, in order; the first is a residual block's."""
    return sorted(name for name in program.weights if name.startswith("heads."))
