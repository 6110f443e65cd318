"""Two prompts, one answer: what the other prompt makes likely as well counts less (USCD, Instructive Decoding)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...ir.choice import Against
from ...ir.errors import SmeltError
from ..sampling import choose
from ..session import Session
from .base import Searcher


class AgainstSearcher(Searcher[Against]):
    """Reads every chosen token behind both prompts, each of which has a cache of its own."""

    def __init__(
        self,
        search: Against,
        session: Session,
        prompts: Sequence[Sequence[int]],
        *rest: Any,
        against: Sequence[Sequence[int]] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(search, session, prompts, *rest, **options)
        self._others = [list(other) for other in against or [prompt[-search.keep :] for prompt in prompts]]
        self._check_others()
        most = max(map(len, self._others)) + self.limits.new_tokens
        self._beside = Session(session.plan, len(prompts), most)
        self._other: dict[int, torch.Tensor] = {}

    def choose_behind(self, logits: Mapping[int, torch.Tensor]) -> dict[int, list[int]]:
        rows = torch.tensor(list(logits))
        laws = torch.stack([self.law(row, self._contrasted(own, self._other[row])) for row, own in logits.items()])
        places = torch.tensor([self.place(row) for row in logits])
        chosen = choose(laws, self.sampling, self._requests[rows], places)
        return {row: [int(token)] for row, token in zip(logits, chosen, strict=True)}

    def _contrasted(self, own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Logits [V] from those behind either prompt."""
        search, law = self.search, own.double().softmax(-1)
        uncertainty = 1 - float(law.std(correction=0)) * len(law) ** 0.5
        if max(uncertainty, 0.0) < search.uncertainty:
            return own
        made = own.double() * (1 + search.weight if search.amplify else 1) - search.weight * other.double()
        return made.masked_fill(law < search.floor * law.max(), -torch.inf).float()

    def _read(self) -> None:
        super()._read()
        cache, behind = self._beside.cache, self.running
        if cache.prefilling:
            logits = self._beside.prefill(self._others)["logits"]
            self._other = {row: logits[row].float().clone() for row in range(len(self.rows))}
            return
        real = torch.tensor([[row in behind] for row in range(len(self.rows))])
        tokens = torch.tensor([row.tokens[-1:] for row in self.rows])
        logits = self._beside.step(tokens, torch.tensor(cache.lengths)[:, None] * real, real)["logits"]
        self._other |= {row: logits[row, 0].float().clone() for row in behind}
        cache.commit([[0] if row in behind else [] for row in range(len(self.rows))])

    def _check_others(self) -> None:
        if len(self._others) != len(self.rows):
            raise SmeltError(
                f"generate: {len(self.rows)} prompts need as many others to be written against, not {len(self._others)}"
            )
        self.check_context("against", self._others, self.session.plan)
        for number, other in enumerate(self._others):
            if not other or not all(0 <= token < self.vocabulary for token in other):
                raise SmeltError(
                    f"generate: against {number} must hold a token at least, each from 0 to {self.vocabulary - 1}"
                )
