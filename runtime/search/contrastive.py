"""Contrastive search (Su et al., 2022): likely, but unlike what stands already; the candidates are one tree of depth 1.

One step reads all candidates. The chosen one's row is kept, and so is the law behind it: a token takes one step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...ir.choice import Contrastive
from ...ir.errors import SmeltError
from ..session import Session
from .base import Searcher


class ContrastiveSearcher(Searcher[Contrastive]):
    """Keeps the direction of every hidden state so far; p is the law that the sampling's options shape."""

    def __init__(
        self, search: Contrastive, session: Session, prompts: Sequence[Sequence[int]], *rest: Any, **options: Any
    ) -> None:
        super().__init__(search, session, prompts, *rest, **options)
        if any(session.cache.lengths):
            raise SmeltError(
                "generate: contrastive search compares with all of a prompt, but the states of a prefix were not kept: "
                "give the prompt as a whole"
            )
        self._states: list[torch.Tensor | None] = [None for _ in prompts]
        self._held = [0 for _ in prompts]

    def watch_prompt(self, row: int, outputs: Mapping[str, torch.Tensor]) -> None:
        self._hold(row, _directions(outputs["hidden"]))

    def choose_behind(self, logits: Mapping[int, torch.Tensor]) -> dict[int, list[int]]:
        laws = {number: self.law(number, values).double().softmax(-1) for number, values in logits.items()}
        candidates = {number: _likeliest(law, self.search.candidates) for number, law in laws.items()}
        outputs = self.try_chains({n: [[token] for token in tokens] for n, tokens in candidates.items()})
        best: dict[int, int] = {}
        for number, tokens in candidates.items():
            states = _directions(outputs["hidden"][number, : len(tokens)])
            near = (states @ self._known(number).T).amax(-1).double()
            best[number] = at = int(
                ((1 - self.search.alpha) * laws[number][tokens] - self.search.alpha * near).argmax()
            )
            self._hold(number, states[at : at + 1])
            self._behind[number] = outputs["logits"][number, at].float().clone()
        self.keep({number: (at, 1) for number, at in best.items()})
        return {number: [candidates[number][at]] for number, at in best.items()}

    def _hold(self, row: int, states: torch.Tensor) -> None:
        """Further directions [n, K] of the row."""
        bank = self._states[row]
        if bank is None:
            rows = len(self.rows[row].prompt) + self.limits.new_tokens
            bank = self._states[row] = states.new_empty(rows, states.shape[-1])
        bank[self._held[row] : self._held[row] + len(states)] = states
        self._held[row] += len(states)

    def _known(self, row: int) -> torch.Tensor:
        bank = self._states[row]
        assert bank is not None
        return bank[: self._held[row]]


def _directions(states: torch.Tensor) -> torch.Tensor:
    """States [n, K] of length one, float32, in memory of their own."""
    return torch.nn.functional.normalize(states.float(), dim=-1)


def _likeliest(law: torch.Tensor, count: int) -> list[int]:
    """The likeliest tokens that are possible at all, in the order of their ids: of equal scores the lowest id wins."""
    found = law.topk(min(count, len(law)))
    return sorted(int(token) for token, p in zip(found.indices, found.values, strict=True) if p > 0)
