"""What the frozen model says of the windows of a text: computed when first asked for, and kept while there is room."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ...ir.interpret import interpret
from ...ir.program import Program
from ...ir.weight import Weight

ROOM = 2 << 30  # bytes, of decoded weights and of what is kept each; what goes beyond is computed each time
AT_ONCE = 4  # windows that are measured together

Outputs = dict[str, torch.Tensor]


class Frozen:
    """The outputs of a trunk for windows of tokens int64 [N, L], or what `kept` makes of those of one window.

    A window goes through the model alone, so that its values do not depend on which others were asked for before.
    """

    def __init__(self, trunk: Program, tokens: torch.Tensor, kept: Callable[[Outputs], Outputs] = lambda x: x) -> None:
        self.trunk, self.tokens, self._of = trunk.fork(), tokens, kept
        if sum(4 * math.prod(weight.shape) for weight in trunk.weights.values()) <= ROOM:
            self.trunk.weights = {name: Weight.of(weight.dense()) for name, weight in trunk.weights.items()}
        self._kept: dict[int, Outputs] = {}
        self._room = ROOM

    def __len__(self) -> int:
        return len(self.tokens)

    def at(self, windows: torch.Tensor) -> Outputs:
        """Each of them, [n, L, …], for windows int64 [n]."""
        rows = [self._window(number) for number in windows.tolist()]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def mean(self, loss: Callable[[torch.Tensor], torch.Tensor]) -> float:
        """The mean of a loss over all windows, some at a time."""
        return sum(float(loss(part)) * len(part) for part in self.parts()) / len(self)

    def parts(self) -> tuple[torch.Tensor, ...]:
        """The numbers of all windows, int64, some at a time."""
        found: tuple[torch.Tensor, ...] = torch.arange(len(self)).split(AT_ONCE)
        return found

    @torch.no_grad()
    def _window(self, number: int) -> Outputs:
        if number in self._kept:
            return self._kept[number]
        tokens = self.tokens[number : number + 1]
        positions = torch.arange(tokens.shape[1])[None]
        found = self._of(interpret(self.trunk, {"tokens": tokens, "positions": positions}))
        size = sum(value.numel() * value.element_size() for value in found.values())
        if size <= self._room:
            self._kept[number] = found
            self._room -= size
        return found
