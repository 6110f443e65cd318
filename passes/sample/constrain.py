"""How an artefact holds answers to grammars: masked, aligned (Park et al., 2024) or tested (Lipkin et al., 2025)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from ...ir.choice import ChoicePlan
from ...ir.program import Program
from ..base import Effect, Exactness, Outcome, Pass, Samples, decoder_only


@dataclass(frozen=True)
class Constrain(Pass):
    """Sets how an answer follows a JSON schema, a regular expression or a grammar where a call does not say so.

    Answers without a grammar are untouched, and drafts are accepted under whatever law comes out.

    by: `mask` takes out of the law what may not follow; `align` weighs what may by how much of the law behind it is
        grammatical, as earlier answers to the prompt have shown (ASAp); `reject` chooses as `mask` does and tests few
        tokens, with an estimate of what the grammar left of the law (AWRS).
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    effects: ClassVar[frozenset[Effect]] = frozenset({"choice"})

    by: Literal["mask", "align", "reject"] = "mask"

    def requires(self, program: Program) -> Iterator[str]:
        """A decoder that does not search, if by is not mask."""
        yield from decoder_only(program)
        if self.by != "mask" and program.choice is not None and program.choice.search is not None:
            found = f"{program.choice.name} search{program.changed_by('choice')}"
            yield f"{program.name} chooses by {found}, which is held to grammars by mask: keep one of the two steps"

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Set it in the choice plan."""
        program.choice = replace(program.choice or ChoicePlan(), constrain=self.by)
        program.touch("choice")
        return Outcome(("constrain",))
