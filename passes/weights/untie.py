"""A vocabulary head that is the embedding's table gets a weight of its own, so that the two can be changed apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...ir.ops import EMBEDDING, HEAD, arguments, is_op
from ...ir.program import Program
from ..base import Exactness, Outcome, Pass, Samples

NAME = "lm_head.weight"


@dataclass(frozen=True)
class Untie(Pass):
    """The head's weight under a name of its own; what it holds is shared until one of the two is changed."""

    exactness: ClassVar[Exactness] = Exactness.EXACT

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Give every head that shares its weight with a lookup another name for it."""
        done: list[str] = []
        skipped: dict[str, str] = {}
        for node in program.calls(HEAD):
            weight = arguments(node)["weight"]
            name = str(weight.target)
            if weight.op != "get_attr" or not any(is_op(user, EMBEDDING) for user in program.uses(name)):
                skipped[node.name] = "shares its weight with no lookup"
                continue
            own = NAME if NAME not in program.weights else f"{node.name}.weight"
            with program.graph.inserting_before(node):
                node.replace_input_with(weight, program.weight_node(own, program.weights[name]))
            program.touch(own)
            done.append(own)
        program.prune()
        return Outcome(tuple(done), skipped)
