"""A small model answers, and a large one where that was unsure (Language Model Cascades, Gupta et al., 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ...ir import choice
from ...ir.program import Program
from ._search import Searching


@dataclass(frozen=True)
class Cascade(Searching):
    """The draft model writes the whole answer; the model writes another one where the draft's was not sure enough.

    The draft model comes from decode.skip, or is given to compile as `draft`.

    threshold: nats; the draft's answer holds if the quantile of its tokens' log probabilities is at least this. Minus
        infinity is the draft model alone, anything above 0 the model alone.
    quantile: 0 looks at the least probable token, 0.5 at the median.

    Deviations: one quantile against a threshold, where the paper also learns a rule from several of them.
    """

    kind: ClassVar[type[choice.Search]] = choice.Cascade

    threshold: float = -2.0
    quantile: float = 0.1

    def requires(self, program: Program) -> Iterator[str]:
        """What every search needs, and a draft model of the same tokens."""
        yield from super().requires(program)
        if program.draft is None:
            yield f"{program.name} must have a draft model: put decode.skip in front, or pass draft=… to compile"
            return
        words = [each.facts.get("vocabulary") for each in (program, program.draft)]
        if words[0] != words[1]:
            yield f"the draft model must have the vocabulary of {words[0]} tokens, but has {words[1]}"
