"""The tokens of one step: which are real, at which positions they stand, and which of them each one may see."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

WORD = 64  # new tokens per word of the visibility bitset


@dataclass(frozen=True)
class Step:
    """What `Cache.begin` was told: `positions` and `valid` [B, T], and `ancestors` [T, T] or [B, T, T] of a tree."""

    positions: torch.Tensor
    valid: torch.Tensor
    ancestors: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """New tokens of each row, T."""
        return self.positions.shape[1]

    @cached_property
    def visible(self) -> torch.Tensor:
        """bool [B, T, T]: new token i sees new token j. A token sees itself; one that is not valid sees nothing."""
        both = self.valid[:, :, None] & self.valid[:, None, :]
        if self.ancestors is None:
            return both & (self.positions[:, None, :] <= self.positions[:, :, None])
        itself = torch.eye(self.tokens, dtype=torch.bool, device=self.valid.device)
        return both & (self.ancestors.to(torch.bool) | itself)

    @cached_property
    def words(self) -> torch.Tensor:
        """`visible` as a bitset int64 [B, T, ceil(T / 64)]: bit j % 64 of word j // 64."""
        rows, tokens = self.positions.shape
        if tokens == 1:
            return self.valid[..., None].to(torch.int64)
        width = -(-tokens // WORD)
        bits = self.visible.new_zeros(rows, tokens, width * WORD, dtype=torch.int64)
        bits[..., :tokens] = self.visible
        shifts = torch.arange(WORD, device=bits.device)
        return (bits.view(rows, tokens, width, WORD) << shifts).sum(-1)
