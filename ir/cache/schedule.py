"""How many tokens each row holds in sink, body and tail, for all sites whose pages leave at the same lengths."""

from __future__ import annotations

import torch

from .plan import Counts, Site
from .segments import Segments


class Schedule:
    """Counts of every row, once for all `members`.

    `table` int32 [B, 4] says the same to kernels: sink, body, tail, and the committed length; right from `aim` on.
    """

    def __init__(self, site: Site, rows: int, device: torch.device) -> None:
        self.site = site
        self.members: list[Segments] = []
        self._hold([Counts(0, 0, 0)] * rows, torch.zeros(rows, 4, dtype=torch.int32), device)

    def _hold(self, counts: list[Counts], host: torch.Tensor, device: torch.device) -> None:
        self.counts = counts
        self.table = host.to(device)
        self._host, self._cells = host, host.numpy()  # a store through numpy costs a tenth of one through torch
        self.aim()

    def set(self, row: int, counts: Counts, length: int) -> None:
        """Note what a row of this committed length now holds."""
        self.counts[row] = counts
        self._cells[row] = (*counts, length)

    def aim(self) -> list[int]:
        """Where each row's next new token goes in the tail; noted in `offsets`, and in `even` if all are the same."""
        self.offsets = [counts.tail for counts in self.counts]
        self.even = len(set(self.offsets)) <= 1
        if self.table is not self._host:
            self.table.copy_(self._host)
        return self.offsets

    def take_rows(self, indices: list[int]) -> None:
        """Gather rows: row i becomes the old row `indices[i]`."""
        self._hold([self.counts[i] for i in indices], self._host[indices], self.table.device)
