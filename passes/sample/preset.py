"""Sampling options that an artefact brings along, such as those of locally typical sampling (Meister et al., 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import ClassVar

from ...ir import choice
from ...ir.program import Program
from ..base import Effect, Exactness, Outcome, Pass, Samples, decoder_only


@dataclass(frozen=True)
class Preset(Pass):
    """Sets what `generate` does where a call does not say so; options that are left out stay as they are.

    Drafts are accepted under whatever law the options make, so that every drafter goes along.

    temperature: 0 is greedy, where the options that shape a law to draw from do nothing.
    top_k: draw from the k likeliest tokens; 0 is off.
    top_p: draw from the likeliest tokens of this mass; 1 is off.
    min_p: least probability, relative to the likeliest; 0 is off.
    typical_p: mass of the tokens whose surprise is nearest to the law's entropy; 1 is off.
    repetition_penalty: above 1, less of what stands already.
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    effects: ClassVar[frozenset[Effect]] = frozenset({"choice"})

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        self._preset()

    def requires(self, program: Program) -> Iterator[str]:
        """A decoder."""
        return decoder_only(program)

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Set the options in the choice plan, over those that an earlier step has set."""
        plan = program.choice or choice.ChoicePlan()
        preset = replace(plan.preset, **self._preset().options)
        program.choice = replace(plan, preset=preset)
        program.touch("choice")
        return Outcome(tuple(self._preset().options))

    def _preset(self) -> choice.Preset:
        return choice.Preset(**{option.name: getattr(self, option.name) for option in fields(choice.Preset)})
