"""The drafter that a decode plan names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...ir.decode import DecodePlan, Draft, Heads, Jacobi, Lookahead, Lookup, Model, Recycle, Suffix, Trigrams, Union
from ...ir.errors import SmeltError
from ..sampling import Sampling
from ..session import Session
from ..trees import padded
from .base import Drafter
from .heads import HeadsDrafter
from .jacobi import JacobiDrafter
from .limit import LimitedDrafter
from .lookahead import LookaheadDrafter
from .lookup import LookupDrafter
from .model import ModelDrafter
from .suffix import SuffixDrafter
from .table import RecycleDrafter
from .trigrams import TrigramDrafter
from .union import UnionDrafter


@dataclass(frozen=True)
class Setting:
    """For whom is drafted: the model's session, how it samples, and the id of each row's request, int64 [B]."""

    session: Session
    sampling: Sampling
    requests: torch.Tensor


def drafter(plan: DecodePlan, vocabulary: int, setting: Setting) -> Drafter:
    """The drafter of a decode plan, for the rows of a session."""
    made = _of(plan.draft, plan, vocabulary, setting)
    limit = plan.limit(setting.sampling.greedy)
    if limit is None or limit >= plan.draft.most or not plan.draft.cuts:
        return made
    return LimitedDrafter(made, limit)


def _of(draft: Draft, plan: DecodePlan, vocabulary: int, setting: Setting) -> Drafter:
    rows = len(setting.requests)
    if isinstance(draft, Union):
        return UnionDrafter([_of(each, plan, vocabulary, setting) for each in draft.drafts], draft.nodes)
    if isinstance(draft, Trigrams):
        return TrigramDrafter(draft, plan.tables, vocabulary, rows)
    if isinstance(draft, Model):
        drafting = setting.session.plan.draft
        if drafting is None:
            raise SmeltError("the decode plan drafts by a model, but the program has none")
        session = Session(drafting, rows, setting.session.cache.capacity, nodes=padded(1 + draft.most))
        return ModelDrafter(draft, session, setting.sampling, setting.requests)
    known: dict[type[Draft], Callable[[Any, int, int], Drafter]] = {
        Recycle: RecycleDrafter,
        Heads: HeadsDrafter,
        Lookup: LookupDrafter,
        Suffix: SuffixDrafter,
        Lookahead: LookaheadDrafter,
        Jacobi: JacobiDrafter,
    }
    return known[type(draft)](draft, vocabulary, rows)
