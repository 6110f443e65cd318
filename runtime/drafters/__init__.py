"""Drafters: each proposes a small tree of candidate tokens for every row, which the model then verifies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...ir.decode import DecodePlan, Draft, Heads, Lookup, Recycle, Suffix, Trigrams, Union
from ...ir.errors import SmeltError
from .base import Drafted, Drafter, Verified
from .heads import HeadsDrafter
from .lookup import LookupDrafter
from .suffix import SuffixDrafter
from .table import RecycleDrafter
from .trigrams import TrigramDrafter
from .union import UnionDrafter

__all__ = ["Drafted", "Drafter", "Verified", "drafter"]


def drafter(plan: DecodePlan, vocabulary: int, rows: int) -> Drafter:
    """The drafter of a decode plan, for `rows` sequences."""
    return _of(plan.draft, plan, vocabulary, rows)


def _of(draft: Draft, plan: DecodePlan, vocabulary: int, rows: int) -> Drafter:
    if isinstance(draft, Union):
        return UnionDrafter([_of(each, plan, vocabulary, rows) for each in draft.drafts], draft.nodes)
    if isinstance(draft, Trigrams):
        return TrigramDrafter(draft, plan.tables, vocabulary, rows)
    known: dict[type[Draft], Callable[[Any, int, int], Drafter]] = {
        Recycle: RecycleDrafter,
        Heads: HeadsDrafter,
        Lookup: LookupDrafter,
        Suffix: SuffixDrafter,
    }
    if type(draft) not in known:
        raise SmeltError(f"no drafter for {plan.drafter} in this version of smelt")
    return known[type(draft)](draft, vocabulary, rows)
