"""The model without some of its layers as its own draft model (Draft & Verify, Zhang et al., 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from ...ir.blocks import blocks, without
from ...ir.program import Program
from .._contracts import cached_decoder
from ..base import Effect, Exactness, Outcome, Pass, Samples


@dataclass(frozen=True)
class Skip(Pass):
    """A copy of the model that leaves out layers, or their feed-forward parts alone; its weights are the model's own.

    It drafts when decode.draft comes behind it.

    layers: left out whole, counted from 0; without any, every other layer between the first and the last.
    feedforward: layers whose feed-forward part alone is left out.

    Deviations: the layers are given, where the paper searches for them; the draft has a cache of its own.
    """

    exactness: ClassVar[Exactness] = Exactness.EXACT
    effects: ClassVar[frozenset[Effect]] = frozenset({"decode"})

    layers: tuple[int, ...] = ()
    feedforward: tuple[int, ...] = ()

    def requires(self, program: Program) -> Iterator[str]:
        """A decoder with a cache plan and no draft model, that has these layers."""
        yield from cached_decoder(program)
        if program.draft is not None:
            yield f"{program.name} must not have a draft model yet: keep one of the two steps"
        found = blocks(program)
        count = 1 + max((block.layer for block in found), default=-1)
        for layer in (*self.layers, *self.feedforward):
            if not 0 <= layer < count:
                yield f"layer {layer} must be one of the {count} layers of {program.name}, counted from 0"
        held = {block.layer for block in found if block.kind == "feedforward"}
        for layer in self.feedforward:
            if 0 <= layer < count and layer not in held:
                yield f"layer {layer} must have a feed-forward part of its own, but adds it together with attention"
        if count and len(self._layers(count)) == count:
            yield "one layer must stay at least"

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Add the draft model; the model itself stays as it is."""
        draft = replace(program.fork(), decode=None, draft=None, choice=None, depth=None)
        draft.name = f"{program.name}, some layers left out"
        found = blocks(draft)
        layers = self._layers(1 + max(block.layer for block in found))
        out = [
            block
            for block in found
            if block.layer in layers or (block.layer in self.feedforward and block.kind == "feedforward")
        ]
        without(draft, out)
        program.draft = draft
        program.touch("draft")
        kept = sum(weight.nbytes for weight in draft.weights.values()) / program.nbytes
        return Outcome(tuple(sorted({str(block) for block in out})), notes={"bytes": kept})

    def _layers(self, count: int) -> tuple[int, ...]:
        return self.layers if self.layers or self.feedforward else tuple(range(1, count - 1, 2))
