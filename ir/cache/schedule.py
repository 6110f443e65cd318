"""How many tokens each row holds in sink, body and tail, for all sites whose pages leave at the same lengths."""

from __future__ import annotations

import torch

from .plan import Counts, Site
from .segments import Segments


class Schedule:
    """Counts of every row, once for all `members`.

    `table` int32 [B, 4] says the same to kernels, updated in place: sink, body, tail, and the committed length.
    """

    def __init__(self, site: Site, rows: int, device: torch.device) -> None:
        self.site = site
        self.members: list[Segments] = []
        self.counts = [Counts(0, 0, 0)] * rows
        self.table = torch.zeros(rows, 4, dtype=torch.int32, device=device)
        self.offsets = [0] * rows
        self.even = True

    def set(self, row: int, counts: Counts, length: int) -> None:
        """Note what a row of this committed length now holds."""
        old, self.counts[row] = self.counts[row], counts
        for column, (was, now) in enumerate(zip(old, counts, strict=True)):
            if was != now:
                self.table[row, column] = now
        self.table[row, 3] = length

    def aim(self) -> list[int]:
        """Where each row's next new token goes in the tail; noted in `offsets`, and in `even` if all are the same."""
        self.offsets = [counts.tail for counts in self.counts]
        self.even = len(set(self.offsets)) <= 1
        return self.offsets

    def take_rows(self, indices: list[int]) -> None:
        """Gather rows: row i becomes the old row `indices[i]`."""
        self.counts = [self.counts[i] for i in indices]
        self.table = self.table[torch.tensor(indices, device=self.table.device)]
        self.aim()
