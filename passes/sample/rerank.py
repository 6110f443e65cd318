"""Pause-then-rerank with a learned entropy threshold (AdaDec: Towards Better Code Generation, 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...ir import choice
from ...ir.errors import SmeltError
from ...ir.interpret import interpret
from ...ir.program import Program
from ..base import Calibration, Outcome, Samples
from ._search import Searching, set_search

ROWS = 8  # sequences that are read at once
CUTS = 99  # probabilities among which the best is looked for
NEWTON = 50  # steps at most; a handful reach the optimum of two parameters


@dataclass(frozen=True)
class Rerank(Searching):
    """Where the law's entropy reaches a threshold, the likeliest tokens are told apart by what follows them.

    Each candidate goes on greedily for some tokens; the greatest mean log probability wins. Elsewhere it is greedy.

    The threshold is learned from calibration text, where it is not given: a logistic regression says from the entropy
    how probable it is that the text's own token has rank 1, and the probability below which the model pauses is the one
    that tells best whether it has.

    threshold: nats; null learns it.
    candidates: tokens that are compared, B.
    length: greedy tokens behind each, L.
    tokens: of the text that are looked at.

    Deviations: three fifths of the text fit the regression, a fifth chooses the threshold and the last fifth measures
    it, where the released code measures on what it chose by. Lookahead ends at the end token alone, not where a block
    of code does.
    """

    kind: ClassVar[type[choice.Search]] = choice.Rerank

    threshold: float | None = None
    candidates: int = 3
    length: int = 5
    tokens: int = 16384

    @property
    def calibration(self) -> Calibration:
        return "text" if self.threshold is None else "none"

    def search(self) -> choice.Rerank:
        """What searches, as far as the options say."""
        if self.tokens < 1:
            raise SmeltError(f"tokens counts from 1, not {self.tokens}")
        return choice.Rerank(0.0 if self.threshold is None else self.threshold, self.candidates, self.length)

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Learn the threshold, and set the search in the choice plan."""
        threshold, notes = self.threshold, dict[str, Any]()
        if threshold is None:
            if samples is None:
                raise SmeltError(
                    "sample.rerank learns its threshold from text: pass calibration texts to compile, or set threshold"
                )
            threshold, notes = learned(*observed(program, samples, self.tokens))
        set_search(program, choice.Rerank(threshold, self.candidates, self.length))
        return Outcome(("choice",), notes={"threshold": round(threshold, 4), **notes})


@torch.no_grad()
def observed(program: Program, samples: Samples, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of sequences of the text, [N, T - 1]: the law's entropy in nats, and whether the next token has rank 1."""
    tokens = samples.tokens[: max(1, most // samples.tokens.shape[1])]
    entropies, first = [], []
    for at, rows in enumerate(tokens.split(ROWS)):
        positions = torch.arange(rows.shape[1]).expand(len(rows), -1)
        law = interpret(program, {"tokens": rows, "positions": positions})["logits"][:, :-1].float().log_softmax(-1)
        entropies.append(torch.special.entr(law.exp()).sum(-1).double())
        first.append(law.argmax(-1) == rows[:, 1:])
        samples.progress(min((at + 1) * ROWS, len(tokens)), len(tokens), "reading text")
    return torch.cat(entropies), torch.cat(first)


def learned(entropies: torch.Tensor, first: torch.Tensor) -> tuple[float, dict[str, Any]]:
    """The threshold in nats, and what came of it on text that had no part in it; both arguments are [N, T]."""
    count = len(entropies)
    if count < 5:
        raise SmeltError(f"sample.rerank: {count} sequences cannot be parted in five: give more text, or more tokens")
    fit, choose, check = entropies.tensor_split((count * 3 // 5, count * 4 // 5))
    (x, y), (x2, y2), (x3, y3) = (
        (x.flatten(), y.flatten())
        for x, y in zip((fit, choose, check), first.tensor_split((len(fit), len(fit) + len(choose))), strict=True)
    )
    few = min(int(y.sum()), int((~y).sum()))
    if not few:
        raise SmeltError("sample.rerank: the model is always right or always wrong here: calibrate with other text")
    kept = torch.cat([_some(y, few), _some(~y, few)])  # as many of either kind
    offset, slope = regression(x[kept], y[kept].double())
    if not slope < 0:
        raise SmeltError("sample.rerank: on this text entropy does not tell where the model is wrong: set threshold")
    cuts = torch.arange(1, CUTS + 1, dtype=torch.float64) / (CUTS + 1)
    thresholds = (cuts.logit() - offset) / slope  # entropies below are taken for sure
    right = ((x2[:, None] < thresholds) == y2[:, None]).double().mean(0)
    threshold = max(0.0, float(thresholds[right.argmax()]))
    sure = x3 < threshold
    notes = {
        "accuracy": round(float((sure == y3).double().mean()), 4),
        "always_sure": round(float(y3.double().mean()), 4),
        "paused": round(float((~sure).double().mean()), 4),
    }
    return threshold, notes


def _some(flags: torch.Tensor, count: int) -> torch.Tensor:
    """So many of the places that are true, evenly spread."""
    places = flags.nonzero().flatten()
    return places[torch.arange(count) * len(places) // count]


def regression(x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    """Offset and slope of the logistic regression of y on x, float64 [N], by Newton's method."""
    features = torch.stack([torch.ones_like(x), x], 1)
    found = torch.zeros(2, dtype=x.dtype)
    for _ in range(NEWTON):
        p = (features @ found).sigmoid()
        hessian = (features * (p * (1 - p))[:, None]).T @ features + 1e-6 * torch.eye(2, dtype=x.dtype)
        step = torch.linalg.solve(hessian, features.T @ (y - p))
        found = found + step
        if float(step.abs().max()) < 1e-9:
            break
    return float(found[0]), float(found[1])
