"""Limits what several drafters verify together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from ...ir import decode
from ...ir.errors import SmeltError
from ...ir.program import Program
from ..base import Effect, Exactness, Outcome, Pass, Samples


@dataclass(frozen=True)
class Union(Pass):
    """Of the trees of all drafters in front the likeliest `nodes` are verified in a step."""

    exactness: ClassVar[Exactness] = Exactness.EXACT
    effects: ClassVar[frozenset[Effect]] = frozenset({"decode"})

    nodes: int = 24

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise SmeltError(f"nodes counts from 1, not {self.nodes}")

    def requires(self, program: Program) -> Iterator[str]:
        """Two drafters or more."""
        if program.decode is None or not isinstance(program.decode.draft, decode.Union):
            yield f"{program.name} must have two drafters or more: put such steps as decode.lookup in front"

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Limit the union; the graph stays as it is."""
        plan = program.decode
        if plan is None or not isinstance(plan.draft, decode.Union):
            raise SmeltError("decode.union needs a union of drafters")
        program.decode = replace(plan, draft=replace(plan.draft, nodes=self.nodes))
        program.touch("decode")
        return Outcome(("decode",))
