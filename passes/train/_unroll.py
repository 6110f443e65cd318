"""What a layer that drafts from features learns from: the model's own laws, along drafts of several tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import fx
from torch.nn import functional

from ...ir.blocks import blocks
from ...ir.interpret import interpret
from ...ir.ops import HEAD, QUANTIZED, RMS_NORM, arguments, is_op
from ...ir.ops.loss import HEAD_CROSS_ENTROPY
from ...ir.program import Program
from ...ir.weight import Weight
from ..decode.feature import EPSILON, FEATURES, PROJECTION
from ._frozen import Frozen
from ._split import trunk

LIKELY = 8  # tokens of the model's law that are learned; what is left of it is left out
FITTED = 64  # windows that the projection is fitted on
AT_ONCE = 4  # windows that are measured together


@dataclass
class Unrolled:
    """The cache of one layer while drafts are unrolled: round n reads at each place what a draft of n tokens would.

    In round n a place sees the features of the model up to n places before it, then the draft's own of rounds 1 to n,
    each one place further (the training-time test of EAGLE-3, Li et al., 2025). It is an `AttendingCache`.
    """

    rounds: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """The next round's keys [B, G, T, D] and values."""
        self.rounds.append((k, v))

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The newest round's attention [B, H, T, E]; places before it are those of no draft, and mean nothing."""
        heads, places, last = q.shape[1], q.shape[2], len(self.rounds) - 1
        wide = [tuple(x.repeat_interleave(heads // x.shape[1], 1) for x in pair) for pair in self.rounds]
        own = [tuple(x.roll(last - n, 2) for x in wide[n]) for n in range(1, last + 1)]
        logits = torch.cat([q @ wide[0][0].transpose(-1, -2), *((q * k).sum(-1, keepdim=True) for k, _ in own)], -1)
        logits = logits * scale
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        back = torch.arange(places)[:, None] - torch.arange(places)
        back = torch.cat([back, torch.arange(last - 1, -1, -1).expand(places, -1)], 1)
        seen = back >= torch.tensor([last] * places + [0] * last)
        logits = logits.masked_fill(~(seen if window is None else seen & (back < window)), -torch.inf)
        if sinks is not None:
            logits = torch.cat([logits, sinks[None, :, None, None].expand(len(q), -1, places, 1)], -1)
        share = logits.softmax(-1)
        out = share[..., :places] @ wide[0][1]
        for n, (_, v) in enumerate(own):
            out = out + share[..., places + n : places + n + 1] * v
        return out


@dataclass(frozen=True)
class Unroll:
    """A `Learner` of a draft model that reads features; its weights are float32 copies of the draft's own.

    rounds: drafted tokens that are unrolled; round n counts decay^n. smooth: weight of the distance of features.
    """

    learn: Frozen
    held: Frozen
    part: Program
    head: tuple[torch.Tensor, torch.Tensor | None]
    weights: Mapping[str, torch.Tensor]
    rounds: int
    decay: float
    smooth: float

    @classmethod
    def of(
        cls, program: Program, learn: torch.Tensor, held: torch.Tensor, rounds: int, decay: float, smooth: float
    ) -> Unroll:
        """Of a program whose draft reads its features, on windows [N, L]; the program's weights stay as they are."""
        assert program.draft is not None
        part = program.draft.fork()
        weights = {name: part.weights[name].dense().clone() for name in part.facts["own"]}
        frozen = trunk(program, {FEATURES: program.outputs[FEATURES], "state": _state(program)})
        _fit(program, learn[:FITTED], weights)
        for value in weights.values():
            value.requires_grad_()
        part.weights |= {name: replace(Weight.of(value), parts={"data": value}) for name, value in weights.items()}
        (head,) = part.calls(HEAD)
        a = arguments(head)
        weight, bias = (None if a[name] is None else part.weights[str(a[name].target)] for name in ("weight", "bias"))
        assert weight is not None
        features = part.outputs[FEATURES]
        part.graph.erase_node(next(iter(reversed(part.graph.nodes))))
        part.graph.output({"state": a["x"], FEATURES: features})
        part.prune()
        projection = weight.dense(), None if bias is None else bias.dense()
        return cls(Frozen(frozen, learn), Frozen(frozen, held), part, projection, weights, rounds, decay, smooth)

    def loss(self, windows: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
        """The mean over places, summed over rounds, of cross-entropy with the model's law and of `smooth` distances."""
        return self._loss(self.learn, windows)

    @torch.no_grad()
    def check(self) -> float:
        """The same on the windows that are held out."""
        parts = torch.arange(len(self.held)).split(AT_ONCE)
        return sum(float(self._loss(self.held, part)) * len(part) for part in parts) / len(self.held)

    @torch.no_grad()
    def hits(self, rounds: int, width: int) -> list[list[float]]:
        """[rounds][width]: how often rank r of the n-th drafted token is what the model holds for likeliest."""
        found = torch.zeros(rounds, width, dtype=torch.float64)
        places = torch.zeros(rounds, 1)
        for part in torch.arange(len(self.held)).split(AT_ONCE):
            wanted = self._logits(self.held.at(part)["state"][:, 1:]).argmax(-1)
            for n, (state, _) in enumerate(self._rounds(self.held, part, rounds)):
                right = self._logits(state).topk(width, -1).indices == wanted[:, n:, None]
                found[n] += right.double().sum((0, 1))
                places[n] += right[..., 0].numel()
        return [[float(rate) for rate in ranks] for ranks in found / places]

    def _rounds(self, text: Frozen, windows: torch.Tensor, rounds: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of each round the states in front of the head, and the features, [n, L - 1 - round, K]."""
        tokens, given = text.tokens[windows][:, 1:], text.at(windows)[FEATURES][:, :-1]
        positions, cache, made = torch.arange(tokens.shape[1]).expand_as(tokens), Unrolled(), []
        for n in range(rounds):
            inputs = {"tokens": tokens, "positions": positions, FEATURES: given}
            out = interpret(self.part, inputs, cache)
            made.append((out["state"][:, n:], out[FEATURES][:, n:]))
            given = out[FEATURES].roll(1, 1)
        return made

    def _loss(self, text: Frozen, windows: torch.Tensor) -> torch.Tensor:
        known = text.at(windows)
        with torch.no_grad():
            likely, tokens = self._logits(known["state"][:, 1:]).topk(min(LIKELY, len(self.head[0])), -1)
            shares = likely.softmax(-1)
        total = torch.zeros(())
        for n, (state, features) in enumerate(self._rounds(text, windows, self.rounds)):
            entropy = self._entropy(state.flatten(0, 1), tokens[:, n:].flatten(0, 1), shares[:, n:].flatten(0, 1))
            distance = functional.smooth_l1_loss(features, known[FEATURES][:, n + 1 :])
            total = total + self.decay**n * (entropy + self.smooth * distance)
        return total

    def _entropy(self, state: torch.Tensor, tokens: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy of the head behind states [N, K] with laws over a few tokens [N, k]."""
        weight, bias = self.head
        scores = (weight[tokens] @ state[..., None])[..., 0]
        if bias is not None:
            scores = scores + bias[tokens]
        first = HEAD_CROSS_ENTROPY.target(state, weight, tokens[:, 0].contiguous(), bias)
        mean: torch.Tensor = (first + scores[:, 0] - (shares * scores).sum(-1)).mean()
        return mean

    def _logits(self, state: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = HEAD.reference(state, *self.head)
        return out


def _state(program: Program) -> fx.Node:
    """The state in front of the head, before it is rounded where the head computes with integers."""
    (head,) = program.calls(HEAD)
    node: fx.Node = arguments(head)["x"]
    while is_op(node, QUANTIZED):
        node = arguments(node)["x"]
    return node


@torch.no_grad()
def _fit(program: Program, tokens: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> None:
    """Start the projection where it gives the layer what the model's own gets, by least squares."""
    found = blocks(program)
    first = next(block for block in found if block.layer == found[-1].layer)
    streams = {"token": found[0].input, "stream": first.input, FEATURES: program.outputs[FEATURES]}
    text = Frozen(trunk(program, streams), tokens).at(torch.arange(len(tokens)))
    ones = torch.ones(text[FEATURES].shape[-1])
    sides = [RMS_NORM.reference(side, ones, EPSILON) for side in (text["token"][:, 1:], text[FEATURES][:, :-1])]
    given = torch.cat(sides, -1).flatten(0, 1).double()
    wanted = text["stream"][:, 1:].flatten(0, 1).double()
    square = given.T @ given
    ridge = 1e-3 * square.diagonal().clamp_min(1e-6)  # of each input's own size; some may always be zero
    solved = torch.linalg.solve(square + ridge.diag(), given.T @ wanted).T.float()
    width = wanted.shape[-1]
    weights[f"{PROJECTION}.token"].copy_(solved[:, :width])
    weights[f"{PROJECTION}.feature"].copy_(solved[:, width:])
