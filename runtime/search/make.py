"""Who writes what a program generates: plain decoding with its drafter, or the search that a choice plan names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...ir.choice import Against, Beam, Cascade, Cautious, Contrastive, Rerank, Search, Superposed
from ...ir.errors import SmeltError
from ..constraint import Constraint
from ..generate import Decoding
from ..pace import Pace
from ..sampling import Sampling
from ..session import Session
from ..writer import Limits, Writer
from .against import AgainstSearcher
from .base import Searcher
from .beam import BeamSearcher
from .cascade import CascadeSearcher
from .cautious import CautiousSearcher
from .contrastive import ContrastiveSearcher
from .rerank import Reranker
from .superposed import SuperposedSearcher

KINDS: dict[type[Search], type[Searcher[Any]]] = {
    Against: AgainstSearcher,
    Beam: BeamSearcher,
    Cascade: CascadeSearcher,
    Cautious: CautiousSearcher,
    Contrastive: ContrastiveSearcher,
    Rerank: Reranker,
    Superposed: SuperposedSearcher,
}


def writer(
    session: Session,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    limits: Limits,
    speculate: bool = True,
    constraint: Constraint | None = None,
    against: Sequence[Sequence[int]] | None = None,
    pace: Pace | None = None,
) -> Writer:
    """The writer of a session's program for these prompts; `against`: other prompts, to be contrasted with them.

    `pace`: by which drafting pauses; without it every step drafts.
    """
    plan = session.plan.program.choice
    contrasts = plan is not None and isinstance(plan.search, Against)
    if against is not None and not contrasts:
        raise SmeltError(
            "generate: against is for programs that contrast prompts: add the step sample.against, or leave it out"
        )
    if plan is None or plan.search is None:
        return Decoding(session, prompts, sampling, limits, speculate, constraint=constraint, pace=pace)
    if constraint is not None and constraint.by != "mask":
        raise SmeltError(f"generate: {plan.name} search is held to a grammar by mask: pass constrain='mask'")
    more: dict[str, Any] = {"against": against} if contrasts else {}
    return KINDS[type(plan.search)](plan.search, session, prompts, sampling, limits, constraint=constraint, **more)
