"""A small model answers, and a large one where that was unsure (Language Model Cascades, Gupta et al., 2024)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ...ir.choice import Cascade
from ...ir.errors import SmeltError
from ..sampling import choose
from ..session import Session
from .base import Searcher


class Drawn(Searcher[Cascade]):
    """Plain decoding that remembers the log probability of every token, under the law that it came from."""

    def __init__(
        self, search: Cascade, session: Session, prompts: Sequence[Sequence[int]], *rest: Any, **options: Any
    ) -> None:
        super().__init__(search, session, prompts, *rest, **options)
        self.scores: list[list[float]] = [[] for _ in prompts]

    def choose_behind(self, logits: Mapping[int, torch.Tensor]) -> dict[int, list[int]]:
        rows = torch.tensor(list(logits))
        laws = torch.stack([self.law(row, values) for row, values in logits.items()])
        places = torch.tensor([self.place(row) for row in logits])
        chosen = choose(laws, self.sampling, self._requests[rows], places).tolist()
        for row, law, token in zip(logits, laws.double().log_softmax(-1), chosen, strict=True):
            self.scores[row].append(float(law[token]))
        return {row: [token] for row, token in zip(logits, chosen, strict=True)}


class CascadeSearcher(Drawn):
    """The draft model writes all answers to their ends, then the model those that are not sure."""

    def __init__(
        self, search: Cascade, session: Session, prompts: Sequence[Sequence[int]], *rest: Any, **options: Any
    ) -> None:
        super().__init__(search, session, prompts, *rest, **options)
        if session.plan.draft is None:
            raise SmeltError("the choice plan cascades, but the program has no draft model")
        if any(session.cache.lengths):
            raise SmeltError("generate: a cascade's draft model has not read the prefix: give the prompt as a whole")
        self.check_context("for the draft model prompt", prompts, session.plan.draft)
        small = Session(session.plan.draft, len(prompts), session.cache.capacity)
        self._small = Drawn(search, small, prompts, *rest, **options)

    def sure(self, number: int) -> bool:
        """Whether the draft model's answer holds."""
        scores = torch.tensor(self._small.scores[number], dtype=torch.float64)
        return float(scores.quantile(self.search.quantile)) >= self.search.threshold

    def run(self) -> Iterator[tuple[int, list[int]]]:
        ends = [self.limits.listen() for _ in self.rows]
        for number, tokens in self._small.run():
            if ends[number](tokens):
                self._small.stop(number)
        for number, row in enumerate(self._small.rows):
            if self.sure(number):
                tokens = self._emit(number, list(row.tokens))
                self.rows[number].done, self.rows[number].reason = True, row.reason
                self.counts.tokens += len(tokens)
                yield number, tokens
        if self.running:
            yield from super().run()

    def _fresh(self) -> list[list[int]]:
        return [[] if row.done else fresh for row, fresh in zip(self.rows, super()._fresh(), strict=True)]
