"""Contrast with another prompt (USCD, Wang et al., 2024; Instructive Decoding, Kim et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...ir import choice
from ._search import Searching


@dataclass(frozen=True)
class Against(Searching):
    """What a worse prompt would say as well counts less: its logits y are taken from the prompt's own, z.

    The other prompt comes with the call, `generate(prompt, against=…)`. A call without one takes the end of the prompt:
    examples and instructions stand in front, so that the end is the request without them.

    weight: z - weight y; 0 is plain decoding.
    amplify: (1 + weight) z - weight y instead, which leaves the law as it is where both prompts agree.
    floor: tokens of less than this share of the greatest probability are out where laws are contrasted; 0: none.
    uncertainty: laws are contrasted where 1 - s sqrt(V) is at least this, s the standard deviation of the law over the
        vocabulary: 0 where one token has all, 1 where all have the same. 0 contrasts everywhere, above 1 nowhere.
    keep: tokens of the prompt's end that are the other prompt of a call without one.
    """

    kind: ClassVar[type[choice.Search]] = choice.Against

    weight: float = 0.3
    amplify: bool = False
    floor: float = 0.0
    uncertainty: float = 0.0
    keep: int = 16
