"""Windows of text for a training: some to learn from, and some of its end that are held out."""

from __future__ import annotations

import math

import torch

from ...ir.errors import SmeltError
from ..base import Samples

MOST_HELD = 32  # held-out windows that are used: 4 thousand places tell hit rates to half a point


def windows(samples: Samples, length: int, least: int, holdout: float, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows int64 [N, L] to learn from, and held-out ones, of the training text, else of the calibration text.

    L is `length`, or less where the samples' rows are shorter, but never below `least`. Raises SmeltError, in the name
    of the pass, where the text is too short.
    """
    tokens = samples.lessons
    length = min(length, tokens.shape[1])
    if length < least:
        raise SmeltError(
            f"{name}: windows of {length} tokens are too short; give texts (and length) of {least} or more"
        )
    whole = tokens.shape[1] // length
    cut = tokens[:, : whole * length].reshape(-1, length)
    count = math.ceil(holdout * len(cut))
    if count >= len(cut):
        raise SmeltError(
            f"{name}: {len(cut)} windows of {length} tokens cannot be parted into text to learn and text to check; "
            "give more text with --train FILE, or a smaller length"
        )
    return cut[:-count], cut[-count:][:MOST_HELD]
