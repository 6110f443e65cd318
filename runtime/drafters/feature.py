"""EAGLE (Li et al., 2024): a layer drafts from the model's features, and behind these from its own.

FLASH (2025): a pass gives the features of several places, and laws of as many tokens, before another is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch

from ...ir.decode import Model
from ..sampling import Sampling
from ..session import CHUNK, WIDTHS, Session
from ..trees import Trees
from .base import Drafted, Verified
from .model import ModelDrafter, Sketch

FEATURES = "features"


class FeatureDrafter(ModelDrafter):
    """Place t of the draft's cache holds the feature of token t and token t + 1, so that the pending token is the last.

    Committed places hold what the model said; a tree's places hold the draft's own features, and are dropped. What the
    model was not seen to read (a prefix) the draft does not see either. Rows that have outgrown the draft's cache draft
    nothing.
    """

    watches = True

    def __init__(self, draft: Model, session: Session, sampling: Sampling, requests: torch.Tensor) -> None:
        super().__init__(draft, session, sampling, requests)
        program = session.plan.program
        self._ahead = program.facts.get("ahead", 1)
        width, vocabulary = (program.outputs[name].meta["shape"][-1] for name in (FEATURES, "logits"))
        self._unseen = [0 for _ in requests]  # first tokens that are none of the draft's
        self._unread = [torch.zeros(0, width) for _ in requests]  # features behind the draft's cache
        self._behind = torch.zeros(len(requests), 1, self._ahead, width)  # of the root, and of each node drafted
        self._roots = torch.zeros(len(requests), self._ahead, vocabulary)  # logits behind the root
        self._others = self._roots[:, None]  # logits [B, T, ahead, V] behind the nodes that were drafted

    def watch(self, row: int, outputs: Mapping[str, torch.Tensor]) -> None:
        self._unread[row] = torch.cat([self._unread[row], outputs[FEATURES]])

    def begin(self, row: int, tokens: Sequence[int]) -> None:
        if not self.tokens[row]:
            self._unseen[row] = len(tokens) - 1 - len(self._unread[row])
            tokens = tokens[self._unseen[row] :]
        super().begin(row, tokens)

    def observe(self, row: int, verified: Verified) -> None:
        super().observe(row, verified)
        if verified.fresh:
            self._unread[row] = torch.cat([self._unread[row], verified.outputs[FEATURES][list(verified.path)]])

    def propose_all(self, rows: Sequence[int]) -> dict[int, Drafted]:
        fitting = [row for row in rows if len(self.tokens[row]) <= self.session.cache.capacity]
        made = super().propose_all(fitting) if fitting else {}
        return {row: made.get(row) or Drafted.chain(self.tokens[row][-1:]) for row in rows}

    def _read(self, rows: Sequence[int]) -> torch.Tensor:
        cache, behind = self.session.cache, torch.zeros_like(self._behind[:, :1])
        while any(len(self._unread[row]) for row in rows):
            pieces = [self._unread[row][:CHUNK] if row in rows else self._unread[row][:0] for row in range(len(behind))]
            outputs, ends = self._commit(pieces)
            for row, piece in enumerate(pieces):
                if len(piece):
                    self._roots[row], behind[row, 0] = outputs["logits"][row, -1], outputs[FEATURES][row, ends[row]]
                    self._unread[row] = self._unread[row][len(piece) :]
            cache.commit([list(range(len(piece))) for piece in pieces])
        self._behind = behind
        return self._roots[:, 0]

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
        return self.session.step(tokens, positions, valid, last=last, more=self._known(features)), ends

    def _known(self, features: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """What the draft model reads beside tokens and positions at the next places of each row."""
        return {FEATURES: features}

    def _step(self, drafts: dict[int, Sketch], rows: Sequence[int]) -> dict[int, dict[int, torch.Tensor]]:
        """Logits behind the newest levels: those of the last pass, until all of its states are used up."""
        known = {row: _sources(tuple(drafts[row].tree.parents), self._ahead) for row in rows}
        node = next(iter(drafts[rows[0]].level))
        if known[rows[0]][node] == (node, 0):
            super()._step(drafts, rows)
        return {row: {node: self._guess(row, *known[row][node]) for node in drafts[row].level} for row in rows}

    def _guess(self, row: int, node: int, state: int) -> torch.Tensor:
        return self._others[row, node - 1, state] if node else self._roots[row, state]

    def _evaluate(self, trees: Trees, positions: torch.Tensor, valid: torch.Tensor) -> Mapping[str, torch.Tensor]:
        outputs = super()._evaluate(trees, positions, valid)
        features, logits = (outputs[name] for name in (FEATURES, "logits"))
        shape = *trees.tokens[:, 1:].shape, self._ahead, -1
        self._behind = torch.cat([self._behind[:, :1], features.view(shape)], 1)
        self._others = logits.view(shape)
        return outputs

    def _more(self, trees: Trees) -> Mapping[str, torch.Tensor]:
        states = self._behind.flatten(1, 2)
        read = torch.zeros_like(trees.tokens)
        for row, draft in enumerate(trees.drafts):
            known = [node * self._ahead + state for node, state in _sources(tuple(draft.parents), self._ahead)]
            read[row, : len(known)] = torch.tensor(known)[list(draft.parents)]
        at = read[:, 1:, None].clamp_max(states.shape[1] - 1)  # rows without a draft look at any
        return {FEATURES: states.gather(1, at.expand(-1, -1, states.shape[-1]))}

    def _noise(self, row: int, position: int, size: int, stream: int) -> torch.Tensor:
        return super()._noise(row, position + self._unseen[row], size, stream)


@lru_cache(maxsize=512)
def _sources(parents: tuple[int, ...], ahead: int) -> list[tuple[int, int]]:
    """Where to find what comes behind each node: at which node, itself or one above, and in which of its states."""
    found = [(0, 0)]
    for node in range(1, len(parents)):
        told, state = found[parents[node]]
        found.append((told, state + 1) if state + 1 < ahead else (node, 0))
    return found
