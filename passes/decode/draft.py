"""A smaller model drafts: chains and trees from its own law (speculative decoding, Sequoia, DySpec, SpecTr)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from ...ir import decode
from ...ir.errors import SmeltError
from ...ir.program import Program
from ..base import Effect, Exactness, Outcome, Pass, Samples
from ._join import join, joinable
from ._trees import best_tree


@dataclass(frozen=True)
class Draft(Pass):
    """The program's draft model proposes; it comes from decode.skip, or is given to compile as `draft`.

    width, depth: every level draws `width` tokens where they are likeliest to be reached, `depth` levels deep. A width
        of 1 is a chain.
    rates: with these a tree of fixed shape takes the place of width: how often the first, second, … child of a node is
        accepted (Sequoia); `nodes` are drafted, at most `depth` deep.
    draws: `coupled` uses the verifier's own noise: both models often choose alike, and sampling stays plain decoding to
        the token. `distinct` draws without repetition, `iid` draws `width` independent chains; both need decode.accept.
    entropy: nats; a chain ends where the mean entropy of the draft's last `window` laws is above. 0: never.
    """

    exactness: ClassVar[Exactness] = Exactness.EXACT
    effects: ClassVar[frozenset[Effect]] = frozenset({"decode"})

    width: int = 1
    depth: int = 4
    rates: tuple[float, ...] = ()
    nodes: int = 15
    draws: Literal["coupled", "distinct", "iid"] = "coupled"
    entropy: float = 0.0
    window: int = 5

    def __post_init__(self) -> None:
        if self.nodes < 1 or any(not 0 < rate <= 1 for rate in self.rates):
            raise SmeltError(f"nodes counts from 1 and rates are in (0, 1], not {self.nodes} and {list(self.rates)}")
        self._draft()

    def requires(self, program: Program) -> Iterator[str]:
        """A decoder with a cache plan, and a draft model of the same tokens."""
        yield from joinable(program, self._draft())
        if program.draft is None:
            yield f"{program.name} must have a draft model: put decode.skip in front, or pass draft=… to compile"
            return
        words = [each.facts.get("vocabulary") for each in (program, program.draft)]
        if words[0] != words[1]:
            yield f"the draft model must have the vocabulary of {words[0]} tokens, but has {words[1]}"

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Add the drafter to the decode plan; the graph stays as it is."""
        join(program, self._draft())
        return Outcome(("decode",), notes={"nodes": self._draft().most})

    def _draft(self) -> decode.Model:
        entropy = self.entropy or None
        if not self.rates:
            return decode.Model(None, self.width, self.depth, self.draws, entropy, self.window)
        tree = best_tree([self.rates] * self.depth, self.nodes)
        return decode.Model(tree, len(self.rates), self.depth, self.draws, entropy, self.window)
