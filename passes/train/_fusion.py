"""What heads over fused tokens and features learn from: the model's own laws, some places ahead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from ...ir.blocks import blocks
from ...ir.interpret import interpret
from ...ir.program import Program
from ...ir.weight import Weight
from .._contracts import before_head
from ..decode._layer import FEATURES, PROJECTION
from ..decode.fuse import BEFORE, HEADS
from ._frozen import Frozen, Outputs
from ._head import Head, cut, law
from ._split import trunk

FITTED = 64  # windows that the start is fitted on
RIDGE = 1e-2  # of the inputs' mean square


@dataclass(frozen=True)
class Fusion:
    """A `Learner` of a draft model by decode.fuse; its weights are float32 copies of the draft's own.

    Head j at place t learns the law of the token t + 2 + j, which the model knows at place t + 1 + j of the text; its
    loss counts decay^j. `part` gives their states, `head` is the model's own.
    """

    learn: Frozen
    held: Frozen
    part: Program
    head: Head
    weights: Mapping[str, torch.Tensor]
    decay: float

    @classmethod
    def of(cls, program: Program, decay: float, learn: torch.Tensor, held: torch.Tensor) -> Fusion:
        """Of a program on windows [N, L]; the program's weights stay as they are."""
        assert program.draft is not None
        part = program.draft.fork()
        weights = {name: part.weights[name].dense().clone().requires_grad_() for name in part.facts["own"]}
        part.weights |= {name: replace(Weight.of(v.detach()), parts={"data": v}) for name, v in weights.items()}
        head = cut(part)

        def known(outputs: Outputs) -> Outputs:
            tokens, shares = law(head.logits(outputs["state"]))
            return {**outputs, "likely": tokens, "shares": shares}

        frozen = trunk(program, {FEATURES: program.outputs[FEATURES], "state": before_head(program)})
        return cls(Frozen(frozen, learn, known), Frozen(frozen, held, known), part, head, weights, decay)

    @property
    def heads(self) -> int:
        """How many heads there are, J."""
        return int(self.part.facts["ahead"])

    @torch.no_grad()
    def fit(self, program: Program) -> None:
        """Start, by least squares, where the layer reads what the model's own last one does, and heads from there."""
        assert program.draft is not None
        chosen = torch.arange(min(FITTED, len(self.learn)))
        tokens, known = self.learn.tokens[chosen], self.learn.at(chosen)
        found = blocks(program)
        first = next(block for block in found if block.layer == found[-1].layer)
        wanted = Frozen(trunk(program, {"stream": first.input}), tokens).at(chosen)["stream"][:, 1:]
        names = [f"{PROJECTION}.token", f"{PROJECTION}.feature"]
        sides = {name: program.draft.uses(name)[0].args[0] for name in names}
        given = interpret(trunk(program.draft, sides), _inputs(tokens, known[FEATURES]))  # type: ignore[arg-type]
        solved = _solved(torch.cat([given[name] for name in names], -1), wanted)
        for name, part in zip(names, solved.split([given[name].shape[-1] for name in names], 1), strict=True):
            self.weights[name].copy_(part)
        heads = trunk(program.draft, {"both": program.draft.uses(f"{HEADS}.0")[0].args[0]})  # type: ignore[dict-item]
        heads.weights |= {name: self.part.weights[name] for name in heads.weights.keys() & self.weights.keys()}
        both = interpret(heads, _inputs(tokens, known[FEATURES]))["both"]
        for j in range(self.heads):
            solved = _solved(both[:, : both.shape[1] - j], known["state"][:, j + 1 :])
            self.weights[f"{HEADS}.{j}"].copy_(solved)

    def loss(self, windows: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
        """Cross-entropy in nats with the model's law on its likeliest tokens, Σ_j decay^j · its mean over places."""
        return self._loss(self.learn, windows)

    @torch.no_grad()
    def check(self) -> float:
        """The same on the windows that are held out."""
        return self.held.mean(lambda part: self._loss(self.held, part))

    @torch.no_grad()
    def hits(self, width: int) -> list[list[float]]:
        """[J][width]: how often rank r of head j is what the model holds for likeliest, on the held-out windows."""
        found, places = torch.zeros(self.heads, width, dtype=torch.float64), torch.zeros(self.heads, 1)
        for part in self.held.parts():
            for j, (state, known) in enumerate(self._guesses(self.held, part)):
                right = self.head.logits(state).topk(width, -1).indices == known["likely"][..., :1]
                found[j] += right.double().sum((0, 1))
                places[j] += right[..., 0].numel()
        return [[float(rate) for rate in ranks] for ranks in found / places]

    def _guesses(self, text: Frozen, windows: torch.Tensor) -> Iterator[tuple[torch.Tensor, Outputs]]:
        """The states [n, P, K] of each head, and what is known [n, P, …] of the places that it guesses for."""
        known = text.at(windows)
        states = interpret(self.part, _inputs(text.tokens[windows], known[FEATURES]))["state"]
        for j, state in enumerate(states.unbind(2)):
            yield state[:, : state.shape[1] - j], {name: value[:, j + 1 :] for name, value in known.items()}

    def _loss(self, text: Frozen, windows: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(())
        for j, (state, known) in enumerate(self._guesses(text, windows)):
            rows = (value.flatten(0, 1) for value in (state, known["likely"], known["shares"]))
            total = total + self.decay**j * self.head.entropy_with(*rows).mean()
        return total


def _inputs(tokens: torch.Tensor, features: torch.Tensor) -> dict[str, torch.Tensor]:
    """The draft's inputs at all places of windows [n, L] but the last, where the next token is not known."""
    ahead = tokens[:, 1:]
    before = functional.pad(tokens[:, :-1], (1, 0)).unfold(1, 2, 1)  # in front of the first stands 0
    positions = torch.arange(ahead.shape[1]).expand_as(ahead)
    return {"tokens": ahead, BEFORE: before, "positions": positions, FEATURES: features[:, :-1]}


def _solved(given: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The matrix [M, N] that makes `wanted` [..., M] of `given` [..., N] with the least squares."""
    x, y = given.flatten(0, -2).double(), wanted.flatten(0, -2).double()
    square = x.T @ x
    square.diagonal().add_(RIDGE * square.diagonal().mean())
    solved: torch.Tensor = torch.linalg.solve(square, x.T @ y)
    return solved.T.float()
