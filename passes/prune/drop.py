"""Leaves out the blocks that change the stream least (ShortGPT, Men et al. 2024, arXiv:2403.03853)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from ...ir.blocks import Block, blocks, without
from ...ir.errors import SmeltError
from ...ir.program import Program
from .._influence import cosines
from ..base import Calibration, Effect, Exactness, Outcome, Pass, Samples


@dataclass(frozen=True)
class Drop(Pass):
    """Takes out of the model, for good, what turns the residual stream least: its influence is 1 - cos(in, out).

    share: how much of the units to leave out, rounded to whole ones.
    unit: what leaves together: a whole `layer`, or a `block`, which is attention or feed-forward part alone.
    attention, feedforward: layers, counted from 0, whose attention or feed-forward part is left out. Where one is
        given, nothing is measured and `share` says nothing.

    Weights of the blocks leave with them, and attention that left needs no cache. The influence of a unit is measured
    once, in the whole model, as in the paper.
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    effects: ClassVar[frozenset[Effect]] = frozenset({"numerics"})

    share: float = 0.25
    unit: Literal["layer", "block"] = "layer"
    attention: tuple[int, ...] | None = None
    feedforward: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise SmeltError(f"share is above 0 and below 1, but is {self.share}")
        if self._given and not (self.attention or self.feedforward):
            raise SmeltError("attention and feedforward are empty: nothing to leave out")

    @property
    def calibration(self) -> Calibration:
        """Text where blocks are chosen by influence."""
        return "none" if self._given else "text"

    def requires(self, program: Program) -> Iterator[str]:
        """A model of text without a cache plan, with residual blocks of which some attention stays."""
        yield from droppable(program, "prune.drop")
        if program.cache is not None:
            since = program.changed_by("cache")
            yield f"prune.drop must come before the cache is inserted{since}: what a step stores is numbered by layer"
        found = blocks(program)
        for kind, layers in (("attention", self.attention), ("feedforward", self.feedforward)):
            held = sorted({block.layer for block in found if block.kind == kind})
            for layer in layers or ():
                if layer not in held:
                    yield f"layer {layer} must be one of the layers with a part {kind} of its own, which are {held}"
        if set(self.attention or ()) >= {block.layer for block in found if block.kind == "attention"}:
            yield "one attention must stay at least"

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Choose the units and take them out."""
        before, found = program.nbytes, blocks(program)
        units = self._units(found)
        scores: dict[str, float] = {}
        if self._given:
            lists = {"attention": self.attention, "feedforward": self.feedforward}
            chosen = [name for name, unit in units.items() if unit[0].layer in (lists[unit[0].kind] or ())]
        else:
            assert samples is not None
            turns = cosines(program, [(unit[0], unit[-1]) for unit in units.values()], samples)
            scores = {name: 1 - cosine for name, cosine in zip(units, turns, strict=True)}
            ranked = sorted(units, key=scores.__getitem__)[: round(self.share * len(units))]
            chosen = [name for name in units if name in ranked]
        left_out = [block for name in chosen for block in units[name]]
        if len([b for b in left_out if b.kind == "attention"]) == len([b for b in found if b.kind == "attention"]):
            raise SmeltError(f"a share of {self.share:g} leaves no attention: lower it")
        without(program, left_out)
        program.touch(*program.weights)
        skipped = {name: f"its influence is {scores[name]:.3g}, above those left out" for name in scores}
        notes = {"influence": {name: round(score, 4) for name, score in scores.items()}} if scores else {}
        return Outcome(
            tuple(chosen),
            {name: why for name, why in skipped.items() if name not in chosen},
            {**notes, "bytes": {"before": before, "after": program.nbytes}},
        )

    @property
    def _given(self) -> bool:
        return self.attention is not None or self.feedforward is not None

    def _units(self, found: list[Block]) -> dict[str, list[Block]]:
        """What leaves together, by name."""
        if self.unit == "block" or self._given:
            return {str(block): [block] for block in found}
        units: dict[str, list[Block]] = {}
        for block in found:
            units.setdefault(f"layer {block.layer}", []).append(block)
        return units


def droppable(program: Program, name: str) -> Iterator[str]:
    """The contract of passes that take blocks out: a model of text, whose blocks nothing but itself refers to."""
    if "tokens" not in program.inputs or set(program.inputs) - {"tokens", "positions", "mask"}:
        found = ", ".join(program.inputs)
        yield f"the inputs of {program.name} must be tokens with positions or a mask, but are {found}"
    if not blocks(program):
        yield f"{program.name} must have residual blocks with attention, but none were found"
    for plan in ("decode", "depth", "draft"):
        if getattr(program, plan) is not None:
            since = program.changed_by("draft" if plan == "draft" else "decode")
            yield f"{program.name} must not have a {plan} plan yet{since}: put {name} in front"
