"""EAGLE (Li et al., 2024): a layer drafts from the model's features, and behind these from its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ...ir.decode import Model
from ..sampling import Sampling
from ..session import CHUNK, WIDTHS, Session
from ..trees import Trees
from .base import Drafted, Verified
from .model import ModelDrafter

FEATURES = "features"


class FeatureDrafter(ModelDrafter):
    """Place t of the draft's cache holds the feature of token t and token t + 1, so that the pending token is the last.

    Committed places hold what the model said; a tree's places hold the draft's own features, and are dropped. Tokens
    that the model was not seen to read (those of a prefix) have features of zeros. Rows that have outgrown the draft's
    cache draft nothing.
    """

    watches = True

    def __init__(self, draft: Model, session: Session, sampling: Sampling, requests: torch.Tensor) -> None:
        super().__init__(draft, session, sampling, requests)
        shape = session.plan.program.outputs[FEATURES].meta["shape"]
        self._unread = [torch.zeros(0, shape[-1]) for _ in requests]  # features behind the draft's cache
        self._behind = torch.zeros(len(requests), 1, shape[-1])  # of the next token, and of each node that was drafted

    def watch(self, row: int, outputs: Mapping[str, torch.Tensor]) -> None:
        self._unread[row] = torch.cat([self._unread[row], outputs[FEATURES]])

    def begin(self, row: int, tokens: Sequence[int]) -> None:
        super().begin(row, tokens)
        zeros = torch.zeros(len(tokens) - 1 - len(self._unread[row]), self._behind.shape[-1])
        self._unread[row] = torch.cat([zeros, self._unread[row]])

    def observe(self, row: int, verified: Verified) -> None:
        super().observe(row, verified)
        if verified.fresh:
            self._unread[row] = torch.cat([self._unread[row], verified.outputs[FEATURES][list(verified.path)]])

    def propose_all(self, rows: Sequence[int]) -> dict[int, Drafted]:
        fitting = [row for row in rows if len(self.tokens[row]) <= self.session.cache.capacity]
        made = super().propose_all(fitting) if fitting else {}
        return {row: made.get(row) or Drafted.chain(self.tokens[row][-1:]) for row in rows}

    def _read(self, rows: Sequence[int]) -> torch.Tensor:
        cache, behind = self.session.cache, self._behind.new_zeros(len(self.tokens), 1, self._behind.shape[-1])
        logits: torch.Tensor | None = None
        while any(len(self._unread[row]) for row in rows):
            pieces = [self._unread[row][:CHUNK] if row in rows else self._unread[row][:0] for row in range(len(behind))]
            outputs, ends = self._commit(pieces)
            if logits is None:
                logits = torch.zeros(len(pieces), outputs["logits"].shape[-1])
            for row, piece in enumerate(pieces):
                if len(piece):
                    logits[row], behind[row, 0] = outputs["logits"][row, -1], outputs[FEATURES][row, ends[row]]
                    self._unread[row] = self._unread[row][len(piece) :]
            cache.commit([list(range(len(piece))) for piece in pieces])
        self._behind = behind
        assert logits is not None
        return logits

    def _commit(self, pieces: Sequence[torch.Tensor]) -> tuple[Mapping[str, torch.Tensor], torch.Tensor]:
        """Outputs of a step over the next features of each row, logits for its last place alone; and that place."""
        most = max(map(len, pieces))
        width = next(width for width in WIDTHS if width >= most)
        tokens = torch.zeros(len(pieces), width, dtype=torch.int64)
        features = self._behind.new_zeros(len(pieces), width, self._behind.shape[-1])
        sizes, lengths = torch.tensor([len(piece) for piece in pieces]), self.session.cache.lengths
        for row, piece in enumerate(pieces):
            start = lengths[row] + 1
            tokens[row, : len(piece)] = torch.tensor(self.tokens[row][start : start + len(piece)])
            features[row, : len(piece)] = piece
        valid = torch.arange(width) < sizes[:, None]
        positions = (torch.tensor(lengths)[:, None] + torch.arange(width)) * valid
        ends = (sizes - 1).clamp_min(0)
        last = ends if width > 1 else None
        return self.session.step(tokens, positions, valid, last=last, more={FEATURES: features}), ends

    def _evaluate(self, trees: Trees, positions: torch.Tensor, valid: torch.Tensor) -> Mapping[str, torch.Tensor]:
        outputs = super()._evaluate(trees, positions, valid)
        self._behind = torch.cat([self._behind[:, :1], outputs[FEATURES]], 1)
        return outputs

    def _more(self, trees: Trees) -> Mapping[str, torch.Tensor]:
        parents = torch.zeros_like(trees.tokens)
        for row, draft in enumerate(trees.drafts):
            parents[row, : len(draft.parents)] = torch.tensor(draft.parents)
        known = parents[:, 1:, None].clamp_max(self._behind.shape[1] - 1)  # rows without a draft look at any
        return {FEATURES: self._behind.gather(1, known.expand(-1, -1, self._behind.shape[-1]))}
