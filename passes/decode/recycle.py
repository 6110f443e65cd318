"""Drafts with the successors that the model itself last preferred (Token Recycling, arXiv 2408.08696, 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ...ir import decode
from ...ir.errors import SmeltError
from ...ir.program import Program
from ..base import Effect, Exactness, Outcome, Pass, Samples
from ._join import join, joinable
from ._trees import best_tree, usual_rates

LEVELS = 6


@dataclass(frozen=True)
class Recycle(Pass):
    """A table keeps the last seen best successors of every token; a static tree over their ranks is verified at once.

    width: successors kept for each token.
    nodes: drafted tokens verified in a step, the pending token not counted; fewer are cheaper.

    Deviations: the published tree was found by search, this one is best-first under a fixed law of ranks, and close to
    it (see `usual_rates`). Acceptance is by the walk, exact for sampling too; the released code is greedy only.
    """

    exactness: ClassVar[Exactness] = Exactness.EXACT
    effects: ClassVar[frozenset[Effect]] = frozenset({"decode"})

    width: int = 8
    nodes: int = 80

    def __post_init__(self) -> None:
        if self.width < 1 or self.nodes < 1:
            raise SmeltError(f"width and nodes count from 1, not {self.width} and {self.nodes}")

    def requires(self, program: Program) -> Iterator[str]:
        """A decoder with a cache plan that does not recycle yet, and a vocabulary that fills the table's rows."""
        yield from joinable(program, decode.Recycle)
        vocabulary = program.facts.get("vocabulary", self.width)
        if vocabulary < self.width:
            yield f"width must be at most the vocabulary of {vocabulary} tokens, but is {self.width}"

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Set the decode plan; the graph stays as it is."""
        tree = best_tree([usual_rates(self.width)] * LEVELS, self.nodes)
        join(program, decode.Recycle(tree, self.width))
        levels = [tree.depths.count(depth) for depth in range(1, max(tree.depths) + 1)]
        return Outcome(("decode",), notes={"nodes": len(tree) - 1, "levels": levels})
