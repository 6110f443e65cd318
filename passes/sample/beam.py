"""Diverse beam search: Decoding Diverse Solutions from Neural Sequence Models (Vijayakumar et al., 2016)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...ir import choice
from ._search import Searching


@dataclass(frozen=True)
class Beam(Searching):
    """Several groups of beams look for likely texts, each away from what earlier groups chose at the same place.

    The best text of all groups is the answer, by its log probability over length to the power of `alpha`.

    beams: of a group; 1 group of 1 beam is greedy decoding, 1 group is plain beam search.
    groups: that are kept apart.
    diversity: nats that a token counts less for each beam of an earlier group that chose it at this place.
    alpha: 0 compares texts by log probability, 1 by its mean.

    Deviations: the penalty decides at its own place and is no part of a text's score, as in the paper; released code
    adds it up.
    """

    kind: ClassVar[type[choice.Search]] = choice.Beam

    beams: int = 2
    groups: int = 3
    diversity: float = 0.5
    alpha: float = 1.0
