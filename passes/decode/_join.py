"""Passes that add a drafter: a second one makes a union of both, so that recipes compose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch

from ...ir.decode import DecodePlan, Draft, Union
from ...ir.decode.draft import KINDS, kind
from ...ir.program import Program
from .._contracts import cached_decoder
from ..base import Effect, Exactness, Outcome, Pass, Samples


@dataclass(frozen=True)
class Drafting(Pass):
    """A pass whose options are those of one kind of draft; the graph stays as it is."""

    exactness: ClassVar[Exactness] = Exactness.EXACT
    effects: ClassVar[frozenset[Effect]] = frozenset({"decode"})
    kind: ClassVar[type[Draft]]

    def __post_init__(self) -> None:
        self.draft()

    def draft(self) -> Draft:
        """What drafts, with the pass's options."""
        return self.kind(**{option.name: getattr(self, option.name) for option in fields(self.kind)})

    def requires(self, program: Program) -> Iterator[str]:
        """A decoder with a cache plan, whose drafters this one can join."""
        return joinable(program, self.draft())

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Add the drafter to the decode plan."""
        join(program, self.draft())
        return Outcome(("decode",), notes={"most": self.draft().most})


def joinable(program: Program, draft: Draft | type[Draft]) -> Iterator[str]:
    """The contract of passes that add a drafter: a decoder with a cache plan, where this kind does not draft yet.

    A kind stands for drafts that can always be joined.
    """
    yield from cached_decoder(program)
    if program.choice is not None and program.choice.search is not None:
        yield (
            f"{program.name} searches by {program.choice.name}{program.changed_by('choice')}, and a search chooses "
            "without drafts: keep one of the two steps"
        )
    plan = program.decode
    if plan is None:
        return
    since, new = program.changed_by("decode"), draft if isinstance(draft, type) else type(draft)
    if any(type(part) is new for part in plan.draft.parts):
        yield f"{program.name} must not draft by {_name(new)} twice{since}: keep one of the two steps"
    if not all(part.joins for part in plan.draft.parts) or not (isinstance(draft, type) or draft.joins):
        yield (
            f"{program.name} already decodes by {names(plan)}{since}, and only drafts that their context fixes and "
            "that need no rows of their own can be joined: keep one of the two steps"
        )


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


def _name(draft: type[Draft]) -> str:
    return next(name for name, kind_of in KINDS.items() if kind_of is draft)
