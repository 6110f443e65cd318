"""What a call of a compiled decoder gives: each row's tokens and text, and what they took."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Completion:
    """One row's result: new tokens, their text (None without a tokenizer), and why it ended.

    `reason`: eos, length, stop, or grammar where a constraint allows nothing more.
    `log_weight`: with constrain="reject" and a temperature, the log of an unbiased estimate of what share of the
    model's law the grammar left along the row.
    `others`: token ids of further answers, best first, where a search found several.

    A stop string is not part of the text; the token that completed it is one of the tokens.
    """

    tokens: list[int]
    text: str | None
    reason: str
    log_weight: float | None = None
    others: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Generation:
    """All rows of one call, with what it took: model steps after the prompt, tokens they gave, seconds of each part."""

    rows: list[Completion]
    steps: int
    step_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def tokens_per_step(self) -> float:
        """Committed tokens per model step, the first token of each row (the prompt's) not counted."""
        return self.step_tokens / self.steps if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens per second after the prompt."""
        return self.step_tokens / self.decode_seconds if self.decode_seconds else 0.0
