"""Cautious next token prediction: several trials where the model is unsure (Wang et al., 2025)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from ...ir import choice
from ...ir.program import Program
from ..base import Outcome, Samples
from ._search import Searching, set_search


@dataclass(frozen=True)
class Cautious(Searching):
    """Where the entropy H of the law is high, several continuations run to the next punctuation; the surest is kept.

    There are floor(most (H - low) / (high - low)) of them, 1 to `most`; the one of greatest mean log probability wins.
    Greedy decoding is as it was: set a temperature, such as by sample.preset.

    most: trials at most.
    low, high: entropies in nats, of the law that sampling options shape.
    length: tokens of a trial at most.
    ends: ids of the tokens that end a trial; by default those whose text ends in one of . , ? ! : ; ) ] } or a line.
    """

    kind: ClassVar[type[choice.Search]] = choice.Cautious

    most: int = 10
    low: float = 0.01
    high: float = 1.5
    length: int = 16
    ends: tuple[int, ...] = ()

    def requires(self, program: Program) -> Iterator[str]:
        """What every search needs, and to know which tokens end a trial."""
        yield from super().requires(program)
        if not self.ends and not program.facts.get("token_breaks"):
            yield (
                f"{program.name} must come with a tokenizer, whose punctuation ends a trial: pass tokenizer=FOLDER, or "
                "list the ids as ends"
            )

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Set the search in the choice plan, with the ids of the tokens that end a trial."""
        breaks = program.facts.pop("token_breaks", ())
        ends = self.ends or tuple(breaks)
        set_search(program, replace(choice.Cautious(self.most, self.low, self.high, self.length), ends=ends))
        return Outcome(("choice",), notes={"ends": len(ends)})
