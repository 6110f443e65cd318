"""Buffers of a binding: taken while it is made, given back behind their last reader, and taken again."""

from __future__ import annotations

import torch

ALIGN = 64  # bytes; a cache line, and the widest vector
SLACK = 4  # a freed block serves requests down to a quarter of its size


class Pool:
    """Storage by size: freed blocks are handed out again, smallest fit first."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self.free: list[torch.Tensor] = []
        self.allocated = 0

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """A contiguous buffer with the shape and dtype of `like` (a meta tensor); its content is whatever was there."""
        nbytes = like.numel() * like.element_size()
        fits = [block for block in self.free if nbytes <= block.numel() <= SLACK * max(nbytes, ALIGN)]
        if fits:
            block = min(fits, key=torch.numel)
            self.free = [b for b in self.free if b is not block]
        else:
            block = torch.empty(max(1, -(-nbytes // ALIGN)) * ALIGN, dtype=torch.uint8, device=self.device)
            self.allocated += block.numel()
        return block[:nbytes].view(like.dtype).view(like.shape)

    def give(self, storage: torch.UntypedStorage) -> None:
        """Return a block."""
        self.free.append(torch.empty(0, dtype=torch.uint8, device=self.device).set_(storage))
