"""Drafts with a window of guesses that are chosen anew in every step (Speculative Jacobi Decoding, 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...ir import decode
from ._join import Drafting


@dataclass(frozen=True)
class Jacobi(Drafting):
    """What the model chose behind guesses that were not accepted are the guesses of the next step.

    window: guesses.

    Deviations: the paper decodes images, accepts by rejection with the laws that guesses were drawn from, and draws
    anew; here the noise is keyed by position, so that guesses repeat themselves, and the walk accepts them.
    """

    kind: ClassVar[type[decode.Draft]] = decode.Jacobi

    window: int = 16
