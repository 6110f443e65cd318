"""Lets a cached context be edited (Let the Code LLM Edit Itself When You Edit the Code, 2024, arXiv:2407.03157)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ...ir.errors import SmeltError
from ...ir.program import Program
from .._contracts import cached_decoder
from ..base import Effect, Exactness, Outcome, Pass, Samples


@dataclass(frozen=True)
class Edit(Pass):
    """Holds the cache to what `Prefix.edit` needs, and says how much of what stands behind an edit is read again.

    recompute: tokens right behind an edit that are read again, with the new ones. The paper's method reads none.

    Positional integrity encoding: keys behind an edit lose the rotation of their old position and get that of the new
    one. As two rotations about the same axes add up, they are turned once, by the shift.
    """

    exactness: ClassVar[Exactness] = Exactness.EXACT
    effects: ClassVar[frozenset[Effect]] = frozenset({"cache"})

    recompute: int = 0

    def __post_init__(self) -> None:
        if self.recompute < 0:
            raise SmeltError(f"recompute counts tokens behind an edit, {self.recompute} is negative")

    def requires(self, program: Program) -> Iterator[str]:
        """Dense sites that nothing leaves, whose keys are rotated by their positions."""
        yield from cached_decoder(program)
        for site in program.cache.sites if program.cache else ():
            if site.rope is None:
                yield (
                    f"keys of layer {site.layer} must be rotated by their positions, but are not: they cannot move, "
                    "and an edit moves all that stands behind it"
                )
                return
            if site.tail is not None:
                yield (
                    f"an edit needs all tokens as they were read, but layer {site.layer} lets them leave its tail"
                    f"{program.changed_by('cache')}: leave that step out"
                )
                return

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Note the option; the sites are right as they are."""
        assert program.cache is not None
        program.facts["edit"] = {"recompute": self.recompute}
        return Outcome(tuple(f"layer {site.layer}" for site in program.cache.sites))
