"""Where one row stands in its grammar: which tokens may follow, and what of the model's law that leaves."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..ir.errors import SmeltError


class Guide:
    """Holds a row to its grammar by masking: what may not follow has no probability, the rest keeps its proportions."""

    log_weight: float | None = None
    """Log of an estimate of what share of the model's law the grammar left, over all tokens; None: not estimated."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    @property
    def allowed(self) -> torch.Tensor:
        """bool [V]: the tokens that may follow."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        flags = np.unpackbits(bits, count=self._vocabulary, bitorder="little")
        return torch.from_numpy(flags.astype(bool))

    def admits(self, token: int) -> bool:
        """Whether this token may follow; asks for no other."""
        return bool(self._matcher.validate_tokens([token]))

    @property
    def over(self) -> bool:
        """Whether the answer is complete and nothing but an end may follow."""
        if not self._matcher.is_stopped():
            return False
        if not self._matcher.is_accepting():
            raise SmeltError(f"generate: the grammar leads nowhere from here: {brief(self._matcher.get_error())}")
        return True

    def shape(self, logits: torch.Tensor) -> torch.Tensor:
        """The model's logits [V] as the grammar leaves them; what may not follow is -inf."""
        return logits.masked_fill(~self.allowed.to(logits.device), -torch.inf)

    def take(self, token: int) -> None:
        """The row's next token."""
        if not self._matcher.consume_token(token):
            raise SmeltError(f"generate: token {token} is outside of the grammar: {self._matcher.get_error()}")

    def close(self) -> None:
        """The row gets no more tokens."""


def brief(said: str) -> str:
    """What the engine says, in one line."""
    return " ".join(line.strip() for line in said.splitlines() if line.strip())[:300]
