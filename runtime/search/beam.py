"""Beam search in groups that are kept apart (Diverse Beam Search, Vijayakumar et al., 2016); a beam is a cache row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...ir.choice import Beam
from ...ir.errors import SmeltError
from .base import Searcher


@dataclass(frozen=True)
class _Text:
    """Tokens so far, and the sum of their log probabilities; `beam` is the one that the last token came behind."""

    tokens: tuple[int, ...] = ()
    score: float = 0.0
    beam: int = 0


@dataclass
class _Group:
    """A prompt's group: `live` texts stand in the cache's rows, `ended` ones have met an end token."""

    live: list[_Text] = field(default_factory=lambda: [_Text()])
    ended: list[_Text] = field(default_factory=list)
    over: bool = False


class BeamSearcher(Searcher[Beam]):
    """Reads each prompt once, then gives every beam a row. A row's tokens are known when its search is over."""

    def __init__(self, search: Beam, *rest: Any, **options: Any) -> None:
        super().__init__(search, *rest, **options)
        if self._guides is not None:
            raise SmeltError("generate: beams cannot follow a grammar: leave out the constraint, or use another recipe")
        self._groups = [[_Group() for _ in range(search.groups)] for _ in self.rows]

    def choose_behind(self, logits: Mapping[int, torch.Tensor]) -> dict[int, list[int]]:
        raise NotImplementedError("beams choose together")

    def run(self) -> Iterator[tuple[int, list[int]]]:
        logits = self.session.prefill(self._fresh())["logits"].float()
        width = self.search.beams * self.search.groups
        rows = [number for number in range(len(self.rows)) for _ in range(width)]
        self.session.select_rows(rows)
        logits = logits[rows].clone()
        while running := self.running:
            with self._quiet():
                for number in running:
                    self._choose_texts(number, logits[number * width : (number + 1) * width])
                done = [number for number in running if all(group.over for group in self._groups[number])]
            for number in done:
                tokens = list(self.texts(number)[0])
                self.counts.tokens += len(tokens) - 1  # the first one came out of the prompt
                yield number, self._emit(number, tokens)
            if self.running:
                with self._quiet():
                    logits = self._read_texts()
            self.step_done()

    def others(self, number: int) -> tuple[tuple[int, ...], ...]:
        return tuple(self.texts(number)[1:])

    def texts(self, number: int) -> list[tuple[int, ...]]:
        """All that a row's groups have found, best first."""
        found = [text for group in self._groups[number] for text in _best(group.ended, self.search.beams, self._value)]
        return [text.tokens for text in _best(found, len(found), self._value)]

    def _choose_texts(self, number: int, logits: torch.Tensor) -> None:
        """One more token for every group of a row, in turn, behind logits [beams of all groups, V]."""
        taken = torch.zeros(logits.shape[-1], dtype=torch.float64)  # how often earlier groups chose a token
        for at, group in enumerate(self._groups[number]):
            if group.over:
                continue
            first = at * self.search.beams
            laws = [
                self.law(number, logits[first + beam], text.tokens).double().log_softmax(-1)
                for beam, text in enumerate(group.live)
            ]
            self._grow(group, torch.stack(laws), self.search.diversity * taken)
            for text in group.live:
                taken[text.tokens[-1]] += 1
            full = len(group.ended) >= self.search.beams
            least = min(map(self._value, _best(group.ended, self.search.beams, self._value)), default=-torch.inf)
            if len(group.live[0].tokens) >= self.limits.new_tokens:
                group.ended += group.live
                group.over = True
            elif full and least >= max(map(self._value, group.live)):
                group.over = True

    def _grow(self, group: _Group, laws: torch.Tensor, penalty: torch.Tensor) -> None:
        """The group's best continuations under `laws` [live, V]; the penalty [V] decides, and is not remembered."""
        scores = laws + torch.tensor([text.score for text in group.live], dtype=laws.dtype)[:, None]
        count, vocabulary = self.search.beams, laws.shape[-1]
        # with so many there are enough that do not end; of equal scores the earlier beam and the lower id win
        most = min(count * (1 + len(self.limits.eos)), scores.numel())
        order = (scores - penalty).flatten().sort(descending=True, stable=True).indices[:most].tolist()
        live: list[_Text] = []
        for rank, cell in enumerate(order):
            beam, token = divmod(cell, vocabulary)
            text = _Text((*group.live[beam].tokens, token), float(scores[beam, token]), beam)
            if token not in self.limits.eos:
                live.append(text)
            elif rank < count:
                group.ended.append(text)
        group.live = live[:count]

    def _read_texts(self) -> torch.Tensor:
        """Give every live text the row of the one it goes on from, and read its last token; logits [rows, V]."""
        count, width = self.search.beams, self.search.beams * self.search.groups
        rows = self.session.cache.batch
        source, tokens, real = list(range(rows)), torch.zeros(rows, 1, dtype=torch.int64), [False] * rows
        for number in self.running:
            for at, group in enumerate(self._groups[number]):
                first = number * width + at * count
                for beam, text in enumerate(() if group.over else group.live):
                    source[first + beam] = first + text.beam
                    tokens[first + beam, 0], real[first + beam] = text.tokens[-1], True
        if source != list(range(rows)):
            self.session.select_rows(source)
        valid = torch.tensor(real)[:, None]
        positions = torch.tensor(self.session.cache.lengths)[:, None] * valid
        self.counts.steps += 1
        outputs = self.session.step(tokens, positions, valid)
        self.session.cache.commit([[0] if each else [] for each in real])
        return outputs["logits"][:, 0].float().clone()

    def _value(self, text: _Text) -> float:
        return text.score / math.pow(len(text.tokens), self.search.alpha)


def _best(texts: Sequence[_Text], count: int, value: Any) -> list[_Text]:
    return sorted(texts, key=value, reverse=True)[:count]
