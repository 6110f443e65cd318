"""Drafts by copying what followed the last tokens earlier in the context (prompt lookup, Saxena, 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...ir import decode
from ._join import Drafting


@dataclass(frozen=True)
class Lookup(Drafting):
    """The longest run of last tokens that occurred before is found by an index; what followed it is verified.

    longest, shortest: tokens that must agree.
    tokens: how many are copied.
    branches: different continuations that are verified at once.

    Deviations: the newest of equally long agreements is taken, where released codes take the first; prompts and answers
    are looked up alike.
    """

    kind: ClassVar[type[decode.Draft]] = decode.Lookup

    longest: int = 3
    shortest: int = 1
    tokens: int = 10
    branches: int = 1
