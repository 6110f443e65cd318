"""Rules of acceptance that keep the model's law: rejection sampling (2023), k-sequential selection (SpecTr, 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from ...ir import decode
from ...ir.errors import SmeltError
from ...ir.program import Program
from ..base import Effect, Exactness, Outcome, Pass, Samples
from ._join import names

RULES: dict[str, decode.Accept] = {
    "walk": decode.Walk(),
    "reject": decode.Reject(),
    "k_sequential": decode.KSequential(),
}


@dataclass(frozen=True)
class Accept(Pass):
    """How drafts are accepted; what is sampled has the model's law under each of these, and greedy decoding walks.

    rule: `walk` draws at a node and goes down where a child holds the draw, which every draft has without this step;
        `reject` accepts a child with min(1, p/q) and takes it out of the law where it is refused; `k_sequential` does
        so with p/(ρ q) for independent draws.

    Only under the walk is what is sampled with speculation the same, token for token, as without.
    """

    exactness: ClassVar[Exactness] = Exactness.EXACT
    effects: ClassVar[frozenset[Effect]] = frozenset({"decode"})

    rule: Literal["walk", "reject", "k_sequential"] = "reject"

    def requires(self, program: Program) -> Iterator[str]:
        """A drafter whose drafts the rule is valid for."""
        yield from valid(program, RULES[self.rule])

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Set the rule; the graph stays as it is."""
        accept(program, RULES[self.rule])
        return Outcome(("decode",))


def valid(program: Program, rule: decode.Accept) -> Iterator[str]:
    """The contract of passes that set a rule."""
    plan = program.decode
    if plan is None:
        yield f"{program.name} must draft: put a step such as decode.draft in front"
        return
    try:
        replace(plan, accept=rule)
    except SmeltError as fault:
        yield f"{program.name} drafts by {names(plan)}{program.changed_by('decode')}: {fault}"


def accept(program: Program, rule: decode.Accept) -> None:
    """Set the rule of a program that drafts."""
    if program.decode is None:
        raise SmeltError("there are no drafts to accept")
    program.decode = replace(program.decode, accept=rule)
    program.touch("decode")
