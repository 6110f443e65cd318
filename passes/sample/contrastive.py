"""Contrastive search: A Contrastive Framework for Neural Text Generation (Su et al., 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...ir import choice
from ._search import Searching


@dataclass(frozen=True)
class Contrastive(Searching):
    """Chooses among the likeliest tokens the one that is likely and whose hidden state is unlike all earlier ones.

    The score is (1 - alpha) p - alpha s, s the greatest cosine with the state behind an earlier token. Adds the output
    `hidden` [B, T, K], the state in front of the vocabulary head; `logits` are untouched.

    candidates: tokens that are compared, k.
    alpha: weight of the penalty; 0 is greedy decoding.
    """

    kind: ClassVar[type[choice.Search]] = choice.Contrastive

    candidates: int = 4
    alpha: float = 0.6
