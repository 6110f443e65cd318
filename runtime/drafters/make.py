"""The drafter that a decode plan names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...codegen.largest import Largest
from ...ir.decode import (
    DecodePlan,
    Draft,
    Fused,
    Heads,
    Jacobi,
    Lookahead,
    Lookup,
    Model,
    Prompts,
    Recycle,
    Suffix,
    Trigrams,
    Union,
)
from ...ir.errors import SmeltError
from ..sampling import Sampling
from ..session import Session
from ..trees import padded
from .base import Drafter
from .feature import FEATURES, FeatureDrafter
from .fused import FusedDrafter
from .heads import HeadsDrafter
from .jacobi import JacobiDrafter
from .limit import LimitedDrafter
from .lookahead import LookaheadDrafter
from .lookup import LookupDrafter
from .model import ModelDrafter
from .prompts import PromptsDrafter
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
    draft, limit = plan.draft, plan.limit(setting.sampling.greedy)
    if limit is None or limit >= draft.most or not draft.cuts:
        return _of(draft, plan, vocabulary, setting)
    if isinstance(draft, Prompts):  # a tree that is made for fewer rows is better than one that is cut
        return _of(replace(draft, rows=limit), plan, vocabulary, setting)
    return LimitedDrafter(_of(draft, plan, vocabulary, setting), limit)


def _of(draft: Draft, plan: DecodePlan, vocabulary: int, setting: Setting) -> Drafter:
    rows = len(setting.requests)
    if isinstance(draft, Union):
        return UnionDrafter([_of(each, plan, vocabulary, setting) for each in draft.drafts], draft.nodes)
    if isinstance(draft, Trigrams):
        return TrigramDrafter(draft, plan.tables, vocabulary, rows)
    if isinstance(draft, Model | Fused):
        drafting = setting.session.plan.draft
        if drafting is None:
            raise SmeltError("the decode plan drafts by a model, but the program has none")
        session = Session(drafting, rows, setting.session.cache.capacity, nodes=padded(1 + draft.most))
        if isinstance(draft, Fused):
            return FusedDrafter(draft, session, setting.sampling, setting.requests)
        kind = FeatureDrafter if FEATURES in drafting.program.inputs else ModelDrafter
        return kind(draft, session, setting.sampling, setting.requests)
    if isinstance(draft, Recycle):
        find = Largest(draft.width) if setting.session.plan.target == "cpp" else None
        return RecycleDrafter(draft, vocabulary, rows, find)
    known: dict[type[Draft], Callable[[Any, int, int], Drafter]] = {
        Heads: HeadsDrafter,
        Prompts: PromptsDrafter,
        Lookup: LookupDrafter,
        Suffix: SuffixDrafter,
        Lookahead: LookaheadDrafter,
        Jacobi: JacobiDrafter,
    }
    return known[type(draft)](draft, vocabulary, rows)
