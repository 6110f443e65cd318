"""Steps without feed-forward parts that change little (FFN-SkipLLM: … Adaptive Feed Forward Skipping, 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from ...ir.blocks import blocks
from ...ir.depth import DepthPlan, Stage
from ...ir.errors import SmeltError
from ...ir.program import Program
from .._influence import cosines
from ..base import Calibration, Effect, Exactness, Outcome, Pass, Samples
from ._depth import shallow, undrafted


@dataclass(frozen=True)
class Thin(Pass):
    """Feed-forward parts whose output stream points where their input stream does are left out; attention always runs.

    threshold: least cosine of the two, the mean over sample texts; above 1 nothing is left out.
    first, last: layers at the bottom and at the top that always run whole, the paper's cold ones.
    warmup: generated tokens that run the whole model, as prompts do.

    Deviations: the paper decides token by token, and from the first layer that passes the threshold leaves out the
    following ones unseen; here every layer is measured on text and the same ones are left out of all tokens, so that
    a step reads fewer bytes and its calls are fixed.
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    effects: ClassVar[frozenset[Effect]] = frozenset({"decode", "numerics"})

    threshold: float = 0.977
    first: int = 1
    last: int = 1
    warmup: int = 8

    def __post_init__(self) -> None:
        if min(self.first, self.last, self.warmup) < 0:
            raise SmeltError(f"first, last and warmup count from 0, not {self.first}, {self.last} and {self.warmup}")

    @property
    def calibration(self) -> Calibration:
        return "text"

    def requires(self, program: Program) -> Iterator[str]:
        """A decoder with a cache plan that does not draft, with feed-forward parts of their own."""
        yield from undrafted(program)
        if not any(block.kind == "feedforward" for block in blocks(program)):
            yield f"{program.name} must have feed-forward parts of their own, but adds them together with attention"

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Measure the cosines and put the layers that pass into the depth plan; the graph stays as it is."""
        assert samples is not None
        found = [block for block in blocks(program) if block.kind == "feedforward"]
        turns = cosines(program, [(block, block) for block in found], samples)
        by_layer = {block.layer: cosine for block, cosine in zip(found, turns, strict=True)}
        middle = range(self.first, 1 + max(block.layer for block in found) - self.last)
        out = tuple(layer for layer, cosine in by_layer.items() if layer in middle and cosine >= self.threshold)
        skipped = {
            f"layer {layer}": f"cosine {cosine:.3f}, below the threshold of {self.threshold:g}"
            if layer in middle
            else "cold"
            for layer, cosine in by_layer.items()
            if layer not in out
        }
        notes: dict[str, Any] = {"cosines": {f"layer {layer}": round(c, 4) for layer, c in by_layer.items()}}
        if out:
            program.depth = DepthPlan((Stage(self.warmup, feedforward=out),))
            program.touch("decode")
            notes |= shallow(program)
        return Outcome(tuple(f"layer {layer}" for layer in out), skipped, notes)
