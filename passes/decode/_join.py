"""Drafters that join: a second one makes a union of both, so that recipes compose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from ...ir.decode import DecodePlan, Draft, Lookahead, Union
from ...ir.decode.draft import kind
from ...ir.program import Program
from .._contracts import cached_decoder


def joinable(program: Program, draft: type[Draft]) -> Iterator[str]:
    """The contract of passes that add a drafter: a decoder with a cache plan, where this kind does not draft yet."""
    yield from cached_decoder(program)
    plan = program.decode
    if plan is None:
        return
    since = program.changed_by("decode")
    for part in plan.draft.parts:
        if type(part) is not draft:
            continue
        yield f"{program.name} must not draft by {kind(part)} twice{since}: keep one of the two steps"
    for each in {type(part) for part in plan.draft.parts} | {draft}:
        if each.proposal != "fixed" or each is Lookahead:
            yield (
                f"{program.name} already decodes by {plan.drafter}{since}, and only drafts that their context fixes "
                "and that need no rows of their own can be joined: keep one of the two steps"
            )
            return


def join(program: Program, draft: Draft, tables: Mapping[str, torch.Tensor] | None = None) -> None:
    """Add a drafter to the program's decode plan, with its tables."""
    plan = program.decode
    if plan is None:
        plan = DecodePlan(draft)
    else:
        old = plan.draft if isinstance(plan.draft, Union) else Union((plan.draft, draft))
        plan = replace(plan, draft=replace(old, drafts=(*plan.draft.parts, draft)))
    program.decode = plan.with_tables(tables) if tables else plan
    program.touch("decode")


def exchange(plan: DecodePlan, old: Draft, new: Draft) -> DecodePlan:
    """The plan with one of its drafts replaced."""
    if not isinstance(plan.draft, Union):
        return replace(plan, draft=new)
    return replace(plan, draft=replace(plan.draft, drafts=tuple(new if p is old else p for p in plan.draft.drafts)))


def names(plan: DecodePlan) -> str:
    """The kinds of drafts of a plan."""
    return " and ".join(kind(part) for part in plan.draft.parts)
