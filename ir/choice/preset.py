"""Sampling options that hold where a call names none."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..errors import SmeltError

_RANGES = {
    "temperature": "0 (greedy) or above",
    "top_k": "a whole number from 0 (off)",
    "top_p": "between 0 and 1 (off)",
    "min_p": "between 0 (off) and 1",
    "typical_p": "above 0, at most 1 (off)",
    "repetition_penalty": "above 0 (1 is off)",
}


@dataclass(frozen=True)
class Preset:
    """Options by the names of `generate`; None: as it is without a recipe."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        above = {"typical_p", "repetition_penalty"}
        shares = {"top_p", "min_p", "typical_p"}
        for name, value in self.options.items():
            if not 0 <= value < math.inf or (name in above and not value) or (name in shares and value > 1):
                raise SmeltError(f"{name} must be {_RANGES[name]}, not {value}")

    @property
    def options(self) -> dict[str, Any]:
        """Those that are set."""
        return {name: value for name, value in vars(self).items() if value is not None}
