"""Drafts by the counts of what followed the longest known suffix (SuffixDecoding, Oliaro et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...ir import decode
from ._join import Drafting


@dataclass(frozen=True)
class Suffix(Drafting):
    """Every sequence of the request up to `depth` tokens is counted; likely continuations make a tree.

    depth: tokens that are counted, agreement and continuation together.
    factor: drafted tokens for each token that agrees, at most.
    least: continuations less probable than this are not drafted.
    nodes: drafted in a step at most.

    Deviations: only the request itself is counted, not the answers to earlier ones.
    """

    kind: ClassVar[type[decode.Draft]] = decode.Suffix

    depth: int = 24
    factor: float = 1.0
    least: float = 0.1
    nodes: int = 16
