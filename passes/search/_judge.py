"""How much worse candidates are: KL from the program as it was to what they answer, on rows of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ...ir.program import Program
from ..measure import replay
from ._space import Candidate, Space

WHOLE, KEPT = 1 << 14, 512  # vocabularies up to WHOLE are compared whole, of larger ones the likeliest tokens
TOKENS = 4096  # of one forward pass
PREFIX = 4  # a prompt is one part in so many of a row that is read through an encoded cache


@dataclass
class Judge:
    """Compares candidates of a space on texts int64 [N, T]; what the whole program answers to a row is kept."""

    space: Space
    texts: torch.Tensor
    _meant: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, candidate: Candidate, rows: Sequence[int]) -> dict[int, float]:
        """KL(program || candidate) in nats by row, the mean over its tokens; infinite for outputs that are not finite.

        Of a large vocabulary the likeliest tokens are compared one by one and the others as one.
        """
        self._ask([row for row in rows if row not in self._meant])
        program, found = self.space.build(candidate), {}
        for piece in self._pieces(rows):
            for row, logits in zip(piece, self._answers(program, piece), strict=True):
                meant, places = self._meant[row]
                given = logits.float().log_softmax(-1)
                if places is not None:
                    given = _with_rest(given.gather(-1, places))
                kl = float((meant.exp() * (meant - given)).sum(-1).mean())
                found[row] = max(kl, 0.0) if math.isfinite(kl) else math.inf
        return found

    def _ask(self, rows: Sequence[int]) -> None:
        for piece in self._pieces(rows):
            for row, logits in zip(piece, self._answers(self.space.program, piece), strict=True):
                meant, places = logits.float().log_softmax(-1), None
                if meant.shape[-1] > WHOLE:
                    likeliest, places = meant.topk(KEPT, -1)
                    meant = _with_rest(likeliest)
                self._meant[row] = meant, places

    def _pieces(self, rows: Sequence[int]) -> list[Sequence[int]]:
        size = max(1, TOKENS // self.texts.shape[1])
        return [rows[at : at + size] for at in range(0, len(rows), size)]

    def _answers(self, program: Program, rows: Sequence[int]) -> torch.Tensor:
        """Logits [B, T', V]; through the cache where some site may encode."""
        tokens = self.texts[list(rows)]
        if not self._encoded:
            return replay(_uncached(program), tokens, 0)
        return replay(program, tokens, tokens.shape[1] // PREFIX, tokens.shape[1])

    @property
    def _encoded(self) -> bool:
        plan = self.space.program.cache
        return plan is not None and (bool(self.space.caches) or any(site.tail is not None for site in plan.sites))


def _uncached(program: Program) -> Program:
    """The same without its cache plan: each attention sees what stands in front of it."""
    bare = program.fork()
    bare.cache = None
    return bare


def _with_rest(logs: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [..., K], and that of all other tokens together behind them."""
    rest = (1 - logs.exp().sum(-1, keepdim=True)).clamp_min(1e-9).log()
    return torch.cat([logs, rest], -1)
