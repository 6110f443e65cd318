"""What a layer that drafts from features learns from: the model's own laws, along drafts of several tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch.nn import functional

from ...ir.blocks import blocks
from ...ir.interpret import interpret
from ...ir.ops import RMS_NORM
from ...ir.program import Program
from ...ir.weight import Weight
from .._contracts import before_head
from ..decode._layer import EPSILON, FEATURES, PROJECTION
from ..decode.feature import AHEAD
from ._frozen import Frozen
from ._head import Head, cut, law
from ._split import trunk

FITTED = 64  # windows that the projection is fitted on


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
    head: Head
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
        frozen = trunk(program, {FEATURES: program.outputs[FEATURES], "state": before_head(program)})
        _fit(program, learn[:FITTED], weights)
        for value in weights.values():
            value.requires_grad_()
        part.weights |= {name: replace(Weight.of(value), parts={"data": value}) for name, value in weights.items()}
        head = cut(part, FEATURES)
        return cls(Frozen(frozen, learn), Frozen(frozen, held), part, head, weights, rounds, decay, smooth)

    def loss(self, windows: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
        """The mean over places, summed over rounds, of cross-entropy with the model's law and of `smooth` distances."""
        return self._loss(self.learn, windows)

    @torch.no_grad()
    def check(self) -> float:
        """The same on the windows that are held out."""
        return self.held.mean(lambda part: self._loss(self.held, part))

    @torch.no_grad()
    def hits(self, rounds: int, width: int) -> list[list[float]]:
        """[rounds][width]: how often rank r of the n-th drafted token is what the model holds for likeliest.

        Of tokens that are drafted at once, the later ones count where the text goes as the model would have gone.
        """
        found = torch.zeros(rounds, width, dtype=torch.float64)
        places = torch.zeros(rounds, 1)
        for part in self.held.parts():
            wanted = self.head.logits(self.held.at(part)["state"][:, 1:]).argmax(-1)
            own = wanted[:, :-1] == self.held.tokens[part][:, 2:]
            for n, (state, _) in enumerate(self._rounds(self.held, part, rounds)):
                unknown = n % self.part.facts.get("ahead", 1)  # tokens in between, which the draft has guessed at once
                right = self.head.logits(state).topk(width, -1).indices == wanted[:, n:, None]
                right = right[own[:, n - unknown :].unfold(1, unknown, 1).all(-1)]
                found[n] += right.double().sum(0)
                places[n] += len(right)
        return [[float(rate) for rate in ranks] for ranks in found / places.clamp_min(1)]

    def _rounds(self, text: Frozen, windows: torch.Tensor, rounds: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of each drafted token the state in front of the head, and the feature, [n, L - 1 - token, K]."""
        tokens, known = text.tokens[windows][:, 1:], text.at(windows)[FEATURES][:, :-1]
        positions, wide = torch.arange(tokens.shape[1]).expand_as(tokens), known.shape[-1]
        made: list[tuple[torch.Tensor, torch.Tensor]] = []
        cache, given = Unrolled(), [known]
        while (n := len(made)) < rounds:
            for feature in given:
                out = interpret(self.part, {"tokens": tokens, "positions": positions, FEATURES: feature}, cache)
            states, features = (out[name].reshape(*tokens.shape, -1, wide).unbind(2) for name in ("state", FEATURES))
            for j, pair in enumerate(zip(states, features, strict=True)):
                state, feature = (x[:, n : tokens.shape[1] - j] for x in pair)
                made.append((state, feature))
            given = [feature.roll(j + 1, 1) for j, feature in enumerate(features)]  # to the places that they stand for
        return made[:rounds]

    def _loss(self, text: Frozen, windows: torch.Tensor) -> torch.Tensor:
        known = text.at(windows)
        with torch.no_grad():
            tokens, shares = law(self.head.logits(known["state"][:, 1:]))
        total = torch.zeros(())
        for n, (state, features) in enumerate(self._rounds(text, windows, self.rounds)):
            rows = (x.flatten(0, 1) for x in (state, tokens[:, n:], shares[:, n:]))
            entropy = self.head.entropy_with(*rows).mean()
            distance = functional.smooth_l1_loss(features, known[FEATURES][:, n + 1 :])
            total = total + self.decay**n * (entropy + self.smooth * distance)
        return total


@torch.no_grad()
def _fit(program: Program, tokens: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> None:
    """Start the projection where it gives the layer what the model's own gets, by least squares, and states ahead."""
    found = blocks(program)
    first = next(block for block in found if block.layer == found[-1].layer)
    streams = {"token": found[0].input, "stream": first.input, FEATURES: program.outputs[FEATURES]}
    text = Frozen(trunk(program, streams), tokens).at(torch.arange(len(tokens)))
    ones = torch.ones(text[FEATURES].shape[-1])
    sides = [RMS_NORM.reference(side, ones, EPSILON) for side in (text["token"][:, 1:], text[FEATURES][:, :-1])]
    solved = _solved(torch.cat(sides, -1), text["stream"][:, 1:])
    width = text["token"].shape[-1]
    weights[f"{PROJECTION}.token"].copy_(solved[:, :width])
    weights[f"{PROJECTION}.feature"].copy_(solved[:, width:])
    assert program.draft is not None
    for j in range(1, program.draft.facts.get("ahead", 1)):
        weights[f"{AHEAD}.{j}.straight"].copy_(_solved(text[FEATURES][:, :-j], text[FEATURES][:, j:]))


def _solved(given: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The matrix [K, N] that takes `given` [..., N] to `wanted` [..., K] with the least squares."""
    x, y = (side.flatten(0, 1).double() for side in (given, wanted))
    square = x.T @ x
    ridge = 1e-3 * square.diagonal().clamp_min(1e-6)  # of each input's own size; some may always be zero
    solved: torch.Tensor = torch.linalg.solve(square + ridge.diag(), x.T @ y).T.float()
    return solved
