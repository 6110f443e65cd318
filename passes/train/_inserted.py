"""What prompt tokens learn from: the laws of a model at the places after those that they are put behind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from ...ir.interpret import interpret
from ...ir.ops import CACHED_ATTENTION, QUANTIZED, arguments
from ...ir.program import Program
from ...ir.weight import Weight
from ..decode.prompts import PROMPTS
from ._frozen import ROOM, Frozen, Outputs
from ._head import Head, cut, law
from ._split import trunk

PLACES = 16  # of a held-out window, evenly spread


@dataclass
class Beside:
    """The cache of rows that stand beside a text: each sees a part of the text, and rows of its own kind.

    keys [n, G, L, D] and values of the text by layer; `back` int64 [n, R, L + R]: how many places each row stands
    behind what it sees, the text and then the rows; below 0 it does not see it. It is an `AttendingCache`.
    """

    keys: Mapping[int, torch.Tensor]
    values: Mapping[int, torch.Tensor]
    back: torch.Tensor
    _own: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """The rows' keys [n, G, R, D] and values."""
        self._own[layer] = k, v

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The rows' attention [n, H, R, E]."""
        k, v = self._own.pop(layer)
        k, v = torch.cat([self.keys[layer], k], 2), torch.cat([self.values[layer], v], 2)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        logits = q @ k.transpose(-1, -2) * scale
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        seen = self.back >= 0 if window is None else (self.back >= 0) & (self.back < window)
        logits = logits.masked_fill(~seen[:, None], -torch.inf)
        if sinks is not None:
            logits = torch.cat([logits, sinks[None, :, None, None].expand(*logits.shape[:3], 1)], -1)
        return logits.softmax(-1)[..., : k.shape[2]] @ v


@dataclass(frozen=True)
class Inserted:
    """A `Learner` of prompt tokens, put behind several places of a window at once; the text itself runs only once.

    part: the model up to its head, for rows of prompt tokens. places: in a window, for an update. The j-th prompt token
    counts decay^j.
    """

    learn: Frozen
    held: Frozen
    part: Program
    head: Head
    weights: Mapping[str, torch.Tensor]
    vocabulary: int
    places: int
    decay: float

    @classmethod
    def of(cls, program: Program, learn: torch.Tensor, held: torch.Tensor, places: int, decay: float) -> Inserted:
        """Of a program that has prompt tokens, on windows [N, L]; its own weights stay as they are."""
        found = {"logits": program.outputs["logits"]}
        for node in program.calls(CACHED_ATTENTION):
            a = arguments(node)
            found |= {f"key.{a['layer']}": a["key"], f"value.{a['layer']}": a["value"]}
        frozen, part = trunk(program, found), program.fork()
        for node in part.calls(QUANTIZED):  # rounding has no gradient
            node.replace_all_uses_with(arguments(node)["x"])
        head = cut(part)
        if sum(4 * math.prod(weight.shape) for weight in part.weights.values()) <= ROOM:
            part.weights = {name: Weight.of(weight.dense()) for name, weight in part.weights.items()}
        value = part.weights[PROMPTS].dense().float().clone().requires_grad_()
        part.weights[PROMPTS] = replace(Weight.of(value), parts={"data": value})
        vocabulary = int(program.facts["vocabulary"])
        texts = Frozen(frozen, learn, _said), Frozen(frozen, held, _said)
        return cls(*texts, part, head, {PROMPTS: value}, vocabulary, places, decay)

    @property
    def prompts(self) -> int:
        """How many prompt tokens there are, m."""
        return len(self.weights[PROMPTS])

    def loss(self, windows: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
        """Cross-entropy with the model's laws in nats: the mean over places, summed over prompt tokens."""
        last = self.learn.tokens.shape[1] - self.prompts
        return self._loss(self.learn, windows, torch.randint(0, last, (len(windows), self.places), generator=chance))

    @torch.no_grad()
    def check(self) -> float:
        """The same at places of the windows that are held out."""
        return self.held.mean(lambda part: self._loss(self.held, part, self._spread(part)))

    @torch.no_grad()
    def hits(self, width: int) -> tuple[tuple[float, ...], ...]:
        """[m][width]: how often rank r of the j-th prompt token is what the model holds for likeliest there."""
        found, count = torch.zeros(self.prompts, width, dtype=torch.float64), 0
        for part in self.held.parts():
            places = self._spread(part)
            guesses = self.head.logits(self.states(self.held, part, places)).topk(width, -1).indices
            wanted, _ = self._laws(self.held, part, places)
            found += (guesses == wanted[..., :1]).double().sum((0, 1))
            count += places.numel()
        return tuple(tuple(ranks) for ranks in (found / count).tolist())

    def states(self, text: Frozen, windows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """What the head reads at prompt tokens behind `places` int64 [n, P] of these windows: [n, P, m, K]."""
        said, (n, count), m = text.at(windows), places.shape, self.prompts
        number, group = torch.arange(m).repeat(count), torch.arange(count).repeat_interleave(m)
        behind = places.repeat_interleave(m, 1)[..., None]  # [n, R, 1]
        positions = behind[..., 0] + 1 + number
        columns = torch.arange(text.tokens.shape[1])
        to_text = (positions[..., None] - columns).masked_fill(columns > behind, -1)
        to_rows = (positions[:, :, None] - positions[:, None]).masked_fill(group[:, None] != group, -1)
        back = torch.cat([to_text, to_rows], -1)
        layers = [int(name.removeprefix("key.")) for name in said if name.startswith("key.")]
        keys, values = ({layer: said[f"{kind}.{layer}"] for layer in layers} for kind in ("key", "value"))
        inputs = {"tokens": (self.vocabulary + number).expand(n, -1), "positions": positions}
        state: torch.Tensor = interpret(self.part, inputs, Beside(keys, values, back))["state"]
        return state.view(n, count, m, -1)

    def _spread(self, windows: torch.Tensor) -> torch.Tensor:
        last = self.held.tokens.shape[1] - self.prompts - 1
        return torch.linspace(0, last, min(PLACES, last + 1)).long().expand(len(windows), -1)

    def _laws(self, text: Frozen, windows: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest tokens [n, P, m, k] at the places that prompt tokens guess, and their shares."""
        said = text.at(windows)
        at = places[..., None] + 1 + torch.arange(self.prompts)
        row = torch.arange(len(windows))[:, None, None]
        return said["likely"][row, at], said["shares"][row, at]

    def _loss(self, text: Frozen, windows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        tokens, shares = (x.flatten(0, 2) for x in self._laws(text, windows, places))
        state = self.states(text, windows, places).flatten(0, 2)
        entropy = self.head.entropy_with(state, tokens, shares).view(-1, self.prompts).mean(0)
        return (entropy * self.decay ** torch.arange(self.prompts)).sum()


def _said(outputs: Outputs) -> Outputs:
    """What is kept of a window: keys, values, and the likeliest tokens with their shares."""
    likely, shares = law(outputs["logits"])
    kept = {name: value for name, value in outputs.items() if name != "logits"}
    return {**kept, "likely": likely, "shares": shares}
