"""Passes that set a search: its contract, and the plan's one place for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import ClassVar

from ...ir.choice import ChoicePlan, Search
from ...ir.decode.draft import kind as kind_of_draft
from ...ir.program import Program
from .._contracts import before_head, cached_decoder, one_head
from ..base import Effect, Exactness, Outcome, Pass, Samples


@dataclass(frozen=True)
class Searching(Pass):
    """A pass whose options are those of one kind of search; what it needs of the graph is added as outputs."""

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    effects: ClassVar[frozenset[Effect]] = frozenset({"choice", "outputs"})
    kind: ClassVar[type[Search]]

    def __post_init__(self) -> None:
        self.search()

    def search(self) -> Search:
        """What searches, with the pass's options."""
        return self.kind(**{option.name: getattr(self, option.name) for option in fields(self.kind)})

    def requires(self, program: Program) -> Iterator[str]:
        """A decoder with a cache plan that neither searches nor drafts, and the outputs that the search reads."""
        yield from searchable(program)
        if "hidden" in self.kind.outputs and "hidden" not in program.outputs:
            yield from one_head(program)

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Set the search in the choice plan."""
        if "hidden" in self.kind.outputs and "hidden" not in program.outputs:
            program.set_output("hidden", before_head(program))
        set_search(program, self.search())
        return Outcome(("choice",))


def searchable(program: Program) -> Iterator[str]:
    """The contract of passes that set a search."""
    yield from cached_decoder(program)
    if program.choice is not None and program.choice.search is not None:
        since = program.changed_by("choice")
        yield f"{program.name} already searches by {program.choice.name}{since}: keep one of the two steps"
    if program.choice is not None and program.choice.constrain != "mask":
        held = f"{program.choice.constrain}{program.changed_by('choice')}"
        yield f"{program.name} holds answers to grammars by {held}, and a search by mask: keep one of the two steps"
    if program.decode is not None:
        drafts = " and ".join(kind_of_draft(part) for part in program.decode.draft.parts)
        since = program.changed_by("decode")
        yield f"{program.name} decodes by {drafts}{since}, and a search chooses without drafts: keep one of the two"
    if program.depth is not None:
        since = program.changed_by("depth")
        yield f"{program.name} leaves blocks out by a token's position{since}, and a search looks ahead: keep one"


def set_search(program: Program, search: Search) -> None:
    """Put a search into the program's choice plan."""
    program.choice = replace(program.choice or ChoicePlan(), search=search)
    program.touch("choice")
