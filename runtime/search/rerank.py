"""AdaDec (2025): where the model is unsure it pauses, and takes the candidate behind which it goes on most surely.

The candidates grow side by side, each greedily, in one step a token. What the winner's lookahead would choose anyway,
because the model is sure there, is kept: it costs no further step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ...ir.choice import Rerank
from ..sampling import Context
from .base import Searcher


@dataclass
class _Trial:
    """A candidate with what follows it greedily: tokens, their log probabilities, and the logits [V] behind each."""

    tokens: list[int]
    scores: list[float]
    behind: list[torch.Tensor] = field(default_factory=list)
    over: bool = False

    @property
    def score(self) -> float:
        """The mean log probability of its tokens."""
        return sum(self.scores) / len(self.scores)


class Reranker(Searcher[Rerank]):
    """Pauses for all rows together: rows that are sure wait for those that are not.

    Under a grammar candidates follow it and their lookahead does not, so that nothing of that is kept.
    """

    def choose_behind(self, logits: Mapping[int, torch.Tensor]) -> dict[int, list[int]]:
        laws = {number: self.law(number, values).double().log_softmax(-1) for number, values in logits.items()}
        chosen = {number: [int(law.argmax())] for number, law in laws.items()}
        trials = {number: self._candidates(law) for number, law in laws.items() if self._unsure(law)}
        for _ in range(self.search.length):
            if all(each.over for held in trials.values() for each in held):
                break
            self._grow(trials)
        kept = {}
        for number, held in trials.items():
            scores = [each.score for each in held]
            best = scores.index(max(scores))  # of equal ones the likeliest candidate
            chosen[number] = self._taken(number, held[best])
            if held[best].behind:
                kept[number] = best, len(chosen[number])
                self._behind[number] = held[best].behind[len(chosen[number]) - 1]
        if kept:
            self.keep(kept)
        return chosen

    def _unsure(self, law: torch.Tensor) -> bool:
        return self.search.candidates > 1 and entropy(law) >= self.search.threshold

    def _candidates(self, law: torch.Tensor) -> list[_Trial]:
        best = law.topk(min(self.search.candidates, len(law)))
        found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [_Trial([token], [score], over=token in self.limits.eos) for token, score in found if score > -torch.inf]

    def _grow(self, trials: Mapping[int, list[_Trial]]) -> None:
        """Read every candidate with what follows it, and add one token more."""
        outputs = self.try_chains({number: [each.tokens for each in held] for number, held in trials.items()})["logits"]
        for number, held in trials.items():
            for each, node in zip(held, self.forest.ends(number), strict=True):
                if each.over:
                    continue
                each.behind.append(outputs[number, node].float().clone())
                law = self._freely(number, each.behind[-1], each.tokens).double().log_softmax(-1)
                each.tokens.append(int(law.argmax()))
                each.scores.append(float(law.max()))
                each.over = each.tokens[-1] in self.limits.eos

    def _freely(self, number: int, logits: torch.Tensor, path: list[int]) -> torch.Tensor:
        """`law`, whatever grammar there is."""
        seen = None if self._seen is None else Context(self._seen[number][None], torch.tensor([path]))
        return self.finite(number, self.sampling.process(logits[None], seen)[0], path)

    def _taken(self, number: int, winner: _Trial) -> list[int]:
        """The winner, and of its lookahead what would be chosen without a pause."""
        most = min(self.session.cache.room()[number], self.left(number), len(winner.behind))
        most = 1 if self._guides is not None else most
        count = 1
        while count < most:
            law = self._freely(number, winner.behind[count - 1], winner.tokens[:count]).double().log_softmax(-1)
            if self._unsure(law):
                break
            count += 1
        return winner.tokens[:count]


def entropy(law: torch.Tensor) -> float:
    """Of log probabilities, in nats."""
    return float(torch.special.entr(law.exp()).sum())
