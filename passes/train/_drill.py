"""What decoding heads are trained and judged on: their guesses for a text, what came, and what the model chose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from ...ir.errors import SmeltError
from ...ir.interpret import interpret
from ...ir.ops import HEAD, arguments, is_op
from ...ir.program import Program
from ...ir.weight import Weight
from ._frozen import Frozen
from ._head import Head
from ._split import branch, end, trunk

AT_ONCE = 16  # windows whose guesses are held in memory when heads are measured
NONE = -100  # the label of a place that has none
FITTED = 64  # places for each feature of the hidden state, from which the start is fitted
RIDGE = 1e-2  # of the mean square of a feature


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
    """A Program cut at the hidden state that its heads read, and the heads' weights in float32, ready for gradients.

    The branch ends in front of the projections to the vocabulary: the loss takes them, so that no update holds logits.
    """

    learn: Frozen
    held: Frozen
    branch: Program
    projections: tuple[Head, ...]
    weights: Mapping[str, torch.Tensor]
    decay: float
    own: float

    @classmethod
    def of(cls, program: Program, decay: float, own: float, learn: torch.Tensor, held: torch.Tensor) -> Drill:
        """The drill of a Program that has the output `heads`, on windows [N, L]; its own weights stay as they are."""
        weights = {name: program.weights[name].dense().clone().requires_grad_() for name in trained(program)}
        first = "heads.layer.weight" if "heads.layer.weight" in weights else "heads.0.block.weight"
        hidden = program.uses(first)[0].args[0]
        assert isinstance(hidden, fx.Node)
        part = branch(program, hidden, "heads")
        part.weights |= {name: replace(Weight.of(value), parts={"data": value}) for name, value in weights.items()}
        outputs = {"hidden": hidden} | ({"logits": program.outputs["logits"]} if own else {})
        frozen = trunk(program, outputs)
        return cls(Frozen(frozen, learn, _said), Frozen(frozen, held, _said), part, _cut(part), weights, decay, own)

    @property
    def heads(self) -> int:
        """How many heads there are, J."""
        return len(self.projections)

    def guesses(self, text: Frozen, chosen: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What each head projects, J of [n, P, K], and labels [n, P, J], for `chosen` windows of a text; P = L - J - 1.

        Head j at place t guesses token t + j + 2: the model's own head guesses t + 1. The first labels are the tokens
        that came, if they count. The second, with `own` above 0, are those that the model would write: where the text
        is what it would have chosen from t + 1 to t + j + 1, its choice for t + j + 2 is known without writing,
        elsewhere there is NONE.
        """
        tokens, said = text.tokens[chosen], text.at(chosen)
        states = interpret(self.branch, {"hidden": said["hidden"][:, : tokens.shape[1] - self.heads - 1]})
        came = tokens[:, 2:].unfold(1, self.heads, 1)
        labels = [came if self.own < 1 else torch.full_like(came, NONE)]
        if "choice" in said:
            choice = said["choice"]
            followed = (tokens[:, 1:-1] == choice[:, :-2]).unfold(1, self.heads, 1).cumprod(-1).bool()
            labels.append(choice[:, 1:-1].unfold(1, self.heads, 1).masked_fill(~followed, NONE))
        return list(states.values()), labels

    @torch.no_grad()
    def fit(self) -> None:
        """Let the own projection of head j start as the model's own head, on a guess of its state j + 1 places on.

        The guess is linear in the present state, by least squares: x Aⱼ, so that the projection becomes W Aⱼᵀ.
        """
        names = {j: f"heads.{j}.projection.weight" for j in range(self.heads)}
        if not set(names.values()) <= set(self.weights):
            return
        features, length = self.weights[names[0]].shape[1], self.learn.tokens.shape[1]
        count = min(len(self.learn), -(-FITTED * features // length))
        state = self.learn.at(torch.arange(count) * len(self.learn) // count)["hidden"].double()
        now = state[:, : length - self.heads].flatten(0, 1)
        square = now.T @ now
        square.diagonal().add_(RIDGE * square.diagonal().mean())
        for j, name in names.items():
            then = state[:, j + 1 : length - self.heads + j + 1].flatten(0, 1)
            ahead = torch.linalg.solve(square, now.T @ then)
            self.weights[name].copy_(self.weights[name] @ ahead.T.float())

    def loss(self, windows: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
        """Cross-entropy in nats: Σ_j decay^j · ((1 - own) · mean over what came + own · mean over what was chosen)."""
        states, labels = self.guesses(self.learn, windows)
        total = 0.0 * states[0].sum()  # some windows have no label at all
        for j, state in enumerate(states):
            for share, label in zip(self._shares, labels, strict=True):
                entropy = self._entropy(j, state, label[..., j])
                if len(entropy):
                    total = total + share * self.decay**j * entropy.mean()
        return total

    def check(self) -> float:
        """The same on the windows that are held out."""
        return self.measure(1).loss

    @torch.no_grad()
    def measure(self, width: int) -> Score:
        """The score over the windows that are held out, with hit rates of the first `width` ranks."""
        kinds = len(self._shares)
        entropy, places = torch.zeros(2, kinds, self.heads, dtype=torch.float64)
        hits = torch.zeros(kinds, self.heads, width, dtype=torch.float64)
        for part in torch.arange(len(self.held)).split(AT_ONCE):
            states, labels = self.guesses(self.held, part)
            for j, state in enumerate(states):
                for kind, label in enumerate(labels):
                    entropy[kind, j] += self._entropy(j, state, label[..., j]).sum()
                    ranks = self._rank(j, state, label[..., j])
                    places[kind, j] += len(ranks)
                    hits[kind, j] += ranks.bincount(minlength=width)[:width]
        share = torch.tensor(self._shares, dtype=torch.float64)[:, None]
        rates = (share[..., None] * hits / places.clamp_min(1)[..., None]).sum(0)
        decay = self.decay ** torch.arange(self.heads)
        return Score(float((decay * share * entropy / places.clamp_min(1)).sum()), tuple(map(tuple, rates.tolist())))

    @property
    def _shares(self) -> tuple[float, ...]:
        """What each kind of labels counts for."""
        return (1 - self.own, self.own) if self.own else (1.0,)

    def _entropy(self, j: int, state: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Of head j, at the places that have a label."""
        there = label != NONE
        return self.projections[j].entropy(state[there], label[there])

    def _rank(self, j: int, state: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """How many tokens head j holds for likelier than the label, at the places that have one."""
        there = label != NONE
        logits = self.projections[j].logits(state[there])
        return (logits > logits.gather(-1, label[there][:, None])).sum(-1)


def _said(outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is kept of the frozen model's outputs: of logits only the best."""
    return {name: value for name, value in outputs.items() if name != "logits"} | (
        {"choice": outputs["logits"].argmax(-1)} if "logits" in outputs else {}
    )


def _cut(part: Program) -> tuple[Head, ...]:
    """Take the projections off a branch of heads; its outputs become what they project, in order."""
    stacked = part.outputs["heads"]
    found = list(stacked.all_input_nodes)
    for j, node in enumerate(found):
        if not is_op(node, HEAD):
            raise SmeltError(
                f"train.heads: head {j} must end in smelt.head to be trained, but ends in {node.name}: "
                "move train.heads right behind decode.heads"
            )
    projections = tuple(Head.of(part, node) for node in found)
    end(part, {str(j): arguments(node)["x"] for j, node in enumerate(found)})
    return projections


def trained(program: Program) -> list[str]:
    """Names of the heads' own weights, in order."""
    return sorted(name for name in program.weights if name.startswith("heads."))
