"""Cautious next token prediction (2025): where the model is unsure several trials run on, the surest one is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...ir.choice import Cautious
from ...ir.errors import SmeltError
from ..sampling import choose
from .base import Searcher

TRIALS = 0xCA07_1005  # further trials have noise of their own; the first has that of plain decoding


@dataclass
class _Trial:
    """A continuation, and the sum of its tokens' log probabilities under the laws that they were drawn from."""

    number: int
    tokens: list[int] = field(default_factory=list)
    score: float = 0.0
    over: bool = False


class CautiousSearcher(Searcher[Cautious]):
    """All trials of all rows are chains of one step, which grow together until each has reached its end.

    A step gives each of them a token, and reads it from its start again; trials are short.
    """

    def __init__(self, search: Cautious, *rest: Any, **options: Any) -> None:
        super().__init__(search, *rest, **options)
        if self._guides is not None and search.most > 1:
            raise SmeltError(
                "generate: the trials of cautious search cannot follow a grammar: leave out the constraint, or compile "
                "with most=1"
            )
        self._ends = frozenset(search.ends)

    def choose_behind(self, logits: Mapping[int, torch.Tensor]) -> dict[int, list[int]]:
        trials: dict[int, list[_Trial]] = {}
        for number, values in logits.items():
            law = self.law(number, values)
            trials[number] = [_Trial(at) for at in range(self._trials(law))]
            for trial in trials[number]:
                self._grow(number, trial, law, alone=len(trials[number]) == 1)
        while growing := _growing(trials):
            outputs = self.try_chains({number: [t.tokens for t in made] for number, made in growing.items()})
            for number, made in growing.items():
                behind = outputs["logits"][number, self.forest.ends(number)].float()
                for trial, values in zip(made, behind, strict=True):
                    self._grow(number, trial, self.law(number, values, trial.tokens))
        return {number: max(made, key=_mean).tokens for number, made in trials.items()}

    def _trials(self, law: torch.Tensor) -> int:
        """How many trials a row's law asks for; one where nothing is drawn."""
        if self.sampling.greedy:
            return 1
        probability = law.double().softmax(-1)
        return self.search.trials(float(-torch.special.xlogy(probability, probability).sum()))

    def _grow(self, number: int, trial: _Trial, law: torch.Tensor, alone: bool = False) -> None:
        """One more token of a trial, drawn with the noise of its place."""
        at = self.place(number) + len(trial.tokens)
        seed = self.sampling.seed if not trial.number else self.sampling.seed ^ (TRIALS + trial.number)
        drawing = replace(self.sampling, seed=seed)
        token = int(choose(law[None], drawing, self._requests[number : number + 1], torch.tensor([at]))[0])
        trial.tokens.append(token)
        trial.score += float(law.double().log_softmax(-1)[token])
        ends = token in self._ends or token in self.limits.eos
        most = min(self.search.length, self.left(number))
        trial.over = alone or ends or len(trial.tokens) >= most


def _growing(trials: Mapping[int, Sequence[_Trial]]) -> dict[int, list[_Trial]]:
    """Trials that go on, of rows that have any."""
    found = {number: [trial for trial in made if not trial.over] for number, made in trials.items()}
    return {number: made for number, made in found.items() if made}


def _mean(trial: _Trial) -> float:
    """The mean log probability: the least perplexing trial has the greatest."""
    return trial.score / len(trial.tokens)
