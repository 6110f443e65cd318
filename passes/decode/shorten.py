"""Fewer layers the later a token stands (SkipDecode: Autoregressive Skip Decoding with Batching and Caching, 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import ClassVar

from ...ir.blocks import blocks
from ...ir.depth import DepthPlan, Stage
from ...ir.errors import SmeltError
from ...ir.program import Program
from ..base import Effect, Exactness, Outcome, Pass, Samples
from ._depth import shallow, undrafted


@dataclass(frozen=True)
class Shorten(Pass):
    """The number of layers that run falls in a line from `most` to `least` over the first `tokens` generated tokens.

    The bottom `warmup` layers run and as many of the top ones as remain; those between them rest, first the lowest.
    Layers only come to rest, so that a layer that runs has the keys and values of all tokens. A prompt runs all layers.

    most, least: layers that run; without `most` all, without `least` two thirds, rounded up.
    levels: different numbers of layers, each of which is a step of its own over the same weights and cache.

    Deviations: no fine-tuning with the schedule, with which the paper loses almost nothing; tokens are counted from the
    end of the prompt, so that a batch of prompts of different lengths shares the schedule.
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    effects: ClassVar[frozenset[Effect]] = frozenset({"decode", "numerics"})

    most: int | None = None
    least: int | None = None
    warmup: int = 1
    tokens: int = 64
    levels: int = 8

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.levels < 2 or self.warmup < 0:
            raise SmeltError(
                f"tokens count from 1, levels from 2 and warmup from 0, not {self.tokens}, {self.levels}, {self.warmup}"
            )

    def requires(self, program: Program) -> Iterator[str]:
        """A decoder with a cache plan that does not draft, and has these layers."""
        yield from undrafted(program)
        count = _layers(program)
        most, least = self._ends(count)
        if count and not max(1, self.warmup) <= least <= most <= count:
            yield (
                f"least and most must be numbers of layers from {max(1, self.warmup)} (the warm-up) to {count}, least "
                f"at most most, but are {least} and {most}"
            )

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Put the schedule into the depth plan; the graph stays as it is."""
        count = _layers(program)
        most, least = self._ends(count)
        levels = self._levels(most, least).items()
        rests = {start: tuple(range(self.warmup, self.warmup + count - active)) for start, active in levels}
        own = {block.layer for block in blocks(program) if block.kind == "feedforward"}
        found = tuple(Stage(start, rest, tuple(n for n in rest if n in own)) for start, rest in rests.items() if rest)
        if not found:
            return Outcome((), {f"layer {layer}": "all layers are asked for" for layer in range(count)})
        program.depth = DepthPlan(found)
        program.touch("decode")
        return Outcome(tuple(f"layer {layer}" for layer in found[-1].attention), notes=shallow(program))

    def _ends(self, count: int) -> tuple[int, int]:
        """Most and fewest layers that run."""
        most = count if self.most is None else self.most
        return most, min(most, ceil(2 * count / 3)) if self.least is None else self.least

    def _levels(self, most: int, least: int) -> dict[int, int]:
        """Layers that run, by the first token of each level: the level next to the line, the higher one of two."""
        steps, found, before = min(self.levels - 1, most - least), {0: most}, 0
        for fall in ((most - least) * step // steps for step in range(1, steps + 1)):
            found[ceil((fall + before) / 2 * (self.tokens - 1) / (most - least))] = most - fall
            before = fall
        return found


def _layers(program: Program) -> int:
    return 1 + max((block.layer for block in blocks(program)), default=-1)
