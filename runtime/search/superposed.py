"""Superposed Decoding (Shen et al., 2024): one step reads the mixture of several drafts, and all of them go on from it.

A row has one stream of keys and values, those of mixtures: what it holds is no draft's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...ir.choice import Superposed
from ...ir.errors import SmeltError
from .base import Searcher
from .ngrams import Ngrams


@dataclass(frozen=True)
class Draft:
    """Tokens so far, and the sum of their scores."""

    tokens: tuple[int, ...] = ()
    score: float = 0.0

    @property
    def value(self) -> float:
        """By which drafts of different lengths compare."""
        return self.score / len(self.tokens)


class SuperposedSearcher(Searcher[Superposed]):
    """A row's tokens are known when all its drafts are, the best of which they are; the further ones are `others`."""

    def __init__(self, search: Superposed, *rest: Any, **options: Any) -> None:
        super().__init__(search, *rest, **options)
        if self._guides is not None:
            raise SmeltError(
                "generate: superposed drafts cannot follow a grammar: leave out the constraint, or use another recipe"
            )
        plan = self.session.plan.program.choice
        self._counted: Ngrams | None = None
        if search.alpha:
            if plan is None or not plan.tables:
                raise SmeltError("superposed search weighs counted text, and there is none: set alpha to 0")
            self._counted = Ngrams(plan.tables, self.vocabulary, len(search.weights) + 1)
        self._live: list[list[Draft]] = [[Draft()] for _ in self.rows]
        self._ended: list[list[Draft]] = [[] for _ in self.rows]

    def choose_behind(self, logits: Mapping[int, torch.Tensor]) -> dict[int, list[int]]:
        raise NotImplementedError("drafts choose together")

    def run(self) -> Iterator[tuple[int, list[int]]]:
        logits = self.session.prefill(self._fresh())["logits"].float().clone()
        while running := self.running:
            with self._quiet():
                for number in running:
                    self._grow(number, logits[number])
            for number in running:
                if self._over(number):
                    tokens = list(self.drafts(number)[0].tokens)
                    self.counts.tokens += len(tokens) - 1  # the first one came out of the prompt
                    yield number, self._emit(number, tokens)
            if self.running:
                with self._quiet():
                    logits = self._read_mixtures()
            self.step_done()

    def others(self, number: int) -> tuple[tuple[int, ...], ...]:
        return tuple(draft.tokens for draft in self.drafts(number)[1:])

    def drafts(self, number: int) -> list[Draft]:
        """A row's drafts, those that have ended and those that have reached their length, best first."""
        found = [*self._ended[number], *(draft for draft in self._live[number] if self._full(draft))]
        return sorted(found, key=lambda draft: draft.value, reverse=True)[: self.search.drafts]

    def _full(self, draft: Draft) -> bool:
        return len(draft.tokens) >= self.limits.new_tokens

    def _over(self, number: int) -> bool:
        live = self._live[number]
        return not live or self._full(live[0]) or len(self._ended[number]) >= self.search.drafts

    def _grow(self, number: int, logits: torch.Tensor) -> None:
        """The best continuations of a row's drafts behind logits [V]; of equal ones the earlier draft's."""
        found = [grown for draft in self._live[number] for grown in self._continued(number, draft, logits)]
        found.sort(key=lambda draft: draft.score, reverse=True)
        ends = [draft.tokens[-1] in self.limits.eos for draft in found]
        count = self.search.drafts
        self._ended[number] += [draft for draft, end in zip(found[:count], ends, strict=False) if end]
        self._live[number] = [draft for draft, end in zip(found, ends, strict=True) if not end][:count]

    def _continued(self, number: int, draft: Draft, logits: torch.Tensor) -> Iterator[Draft]:
        """A draft with one more token, for every candidate, the likeliest first."""
        law = (self.law(number, logits, draft.tokens).double() / self.search.temperature).log_softmax(-1)
        best = law.topk(min(self.search.candidates, len(law)))
        scores = best.values.log_softmax(-1)
        if self._counted is not None:
            alpha, row = self.search.alpha, self.rows[number]
            shares = self._counted.shares([*row.prompt, *draft.tokens], best.indices)
            seen = torch.tensor(self.search.weights, dtype=torch.float64) @ shares
            unseen = (1 - alpha) * scores - self.search.penalty
            scores = torch.where(seen > 0, (1 - alpha) * scores + alpha * seen.log(), unseen)
        for token, score in zip(best.indices.tolist(), scores.tolist(), strict=True):
            if score > -torch.inf:
                yield Draft((*draft.tokens, token), draft.score + score)

    def _read_mixtures(self) -> torch.Tensor:
        """One step of all rows that go on, each over the mixture of its drafts; logits [rows, V]."""
        rows, running = self.session.cache.batch, self.running
        tokens, real = torch.zeros(rows, 1, dtype=torch.int64), torch.zeros(rows, 1, dtype=torch.bool)
        more = {
            name: torch.zeros(rows, 1, dtype=torch.int64) if name.startswith("beside") else torch.zeros(rows, 1, 1)
            for name in self.search.inputs
        }
        for number in running:
            live = self._live[number]
            tokens[number], real[number] = live[0].tokens[-1], True
            for at, (draft, share) in enumerate(zip(live, mixture(live), strict=True)):
                if at:  # the first one has what the others leave
                    more[f"beside_{at}"][number] = draft.tokens[-1]
                    more[f"share_{at}"][number] = share
        positions = torch.tensor(self.session.cache.lengths)[:, None] * real
        self.counts.steps += 1
        logits = self.session.step(tokens, positions, real, more=more)["logits"][:, 0].float().clone()
        self.session.cache.commit([[0] if number in running else [] for number in range(rows)])
        for name in more:  # buffers of the session: whoever reads a single token next finds no mixture
            self.session.bound(1).inputs[name].zero_()
        return logits


def mixture(drafts: Sequence[Draft]) -> list[float]:
    """The share of each draft, by the softmax of their scores."""
    shares: list[float] = torch.tensor([draft.score for draft in drafts], dtype=torch.float64).softmax(-1).tolist()
    return shares
