"""The tokens of one step: which are real, at which positions they stand, and which of them each one may see."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

WORD = 64  # new tokens per word of the visibility bitset


@dataclass(frozen=True)
class Step:
    """What `Cache.begin` was told: `positions` and `valid` [B, T], and `ancestors` [T, T] or [B, T, T] of a tree.

    A token sees itself; one that is not valid sees nothing and is seen by none.
    """

    positions: torch.Tensor
    valid: torch.Tensor
    ancestors: torch.Tensor | None = None  # never written to

    @property
    def tokens(self) -> int:
        """New tokens of each row, T."""
        return self.positions.shape[1]

    @cached_property
    def addresses(self) -> tuple[int, int]:
        """Of `positions` and `words`, for kernels; they hold as long as the step does."""
        return self.positions.data_ptr(), self.words.data_ptr()

    def sees(self, row: int, queries: slice) -> torch.Tensor:
        """bool [queries, T]: which new tokens these new tokens of a row see."""
        valid, at = self.valid[row], self.positions[row]
        both = valid[queries, None] & valid
        if self.ancestors is None:
            return both & (at <= at[queries, None])
        tree = self.ancestors if self.ancestors.dim() == 2 else self.ancestors[row]
        index = torch.arange(self.tokens, device=at.device)
        return both & (tree[queries].to(torch.bool) | (index == index[queries, None]))

    @cached_property
    def words(self) -> torch.Tensor:
        """What every token sees as a bitset int64 [B, T, ceil(T / 64)]: bit j % 64 of word j // 64."""
        tokens = self.tokens
        if tokens == 1:
            return self.valid[..., None].to(torch.int64)
        if self.ancestors is not None:
            tree = _tree(self.ancestors)
            if self.valid.all():
                return tree.expand(len(self.valid), -1, -1).contiguous()
            return torch.where(self.valid[..., None], _pack(self.valid)[:, None] & tree, 0)
        # valid tokens stand in order, so token i sees the valid ones up to itself
        index = torch.arange(tokens, device=self.valid.device)[:, None]
        ahead = index - WORD * torch.arange(-(-tokens // WORD), device=self.valid.device)
        within = torch.where(ahead < WORD - 1, (1 << (ahead.clamp(-1, WORD - 2) + 1)) - 1, -1)
        return torch.where(self.valid[..., None], _pack(self.valid)[:, None] & within, 0)


@lru_cache(maxsize=64)
def _tree(ancestors: torch.Tensor) -> torch.Tensor:
    """The bitset of a tree's rows, each of which sees itself; trees of static shape come as the same tensor again."""
    return _pack(ancestors.to(torch.bool) | torch.eye(ancestors.shape[-1], dtype=torch.bool, device=ancestors.device))


def _pack(bits: torch.Tensor) -> torch.Tensor:
    """bool [..., T] as int64 [..., ceil(T / 64)]."""
    width = -(-bits.shape[-1] // WORD)
    padded = bits.new_zeros(*bits.shape[:-1], width * WORD, dtype=torch.int64)
    padded[..., : bits.shape[-1]] = bits
    words: torch.Tensor = padded.unflatten(-1, (width, WORD)) << torch.arange(WORD, device=bits.device)
    return words.sum(-1)
