"""Memory for packed weights: few large blocks on huge pages, where a stream of weights misses no page."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable

import torch

from ..ir.weight import Weight

PAGE = 1 << 21
BLOCK = 16 * PAGE
ALIGN = 64


class Arena:
    """Copies tensors into blocks that live as long as any of them; several threads may copy at once."""

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)
        self._taking = threading.Lock()
        self._packed: dict[Weight, list[torch.Tensor]] = {}

    def packed(self, weight: Weight, pack: Callable[[Weight], list[torch.Tensor]]) -> list[torch.Tensor]:
        """What `pack` makes of a weight, once for all plans that share the arena."""
        if weight not in self._packed:
            self._packed[weight] = pack(weight)
        return self._packed[weight]

    def hold(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, contiguous at a place of its own."""
        nbytes = tensor.numel() * tensor.element_size()
        taken = -(-nbytes // ALIGN) * ALIGN
        with self._taking:
            if self._free.numel() < taken:
                self._free = _block(max(BLOCK, taken))
            place, self._free = self._free[:nbytes], self._free[taken:]
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _block(nbytes: int) -> torch.Tensor:
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # Python's own default is shared, which has no huge pages
    whole = mmap.mmap(-1, -(-nbytes // PAGE) * PAGE + PAGE, flags=private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        whole.madvise(mmap.MADV_HUGEPAGE)
    block = torch.frombuffer(whole, dtype=torch.uint8)
    return block[-block.data_ptr() % PAGE :]
