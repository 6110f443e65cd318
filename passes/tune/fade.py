"""Trains a model while it becomes sparse (Progressive Gradient Flow, Bambhaniya et al., 2024, arXiv 2402.04744)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from ...ir.encoding import Dense
from ...ir.errors import SmeltError
from ...ir.program import Program
from ..base import Outcome, Samples
from ..prune.sparsify import Sparsify
from ._fading import Course, Decay, Faded, Schedule, Stage, Thinning
from ._learned import Learned, Relative
from ._taught import Taught


@dataclass(frozen=True)
class Fade(Taught):
    """Keeps N of every M neighbours in the rows of products, and trains them while the others fade out.

    Which are kept is chosen by magnitude anew in each update, so that a weight may come back while its gradient flows.
    Gains and biases of norms learn as well. What stays is stored like that of `prune.sparsify`, and `weights.gptq` or
    `weights.quantize` may round it.

    pattern: N:M, such as `2:4`.
    decay: how the others go: what they count falls to nothing in a `linear` or `exponential` way; or fewer of M are
        kept in steps, from M - 1 by halves to N (`stepwise`), or N of M in ever smaller neighbourhoods, 8N of 8M first
        (`geometric`); or all at once, `none`.
    final: share of the updates behind the decay, at the pattern that stays.
    gradient: of the others: `straight-through` as if they counted in full, as in the released code, or `masked`, by
        what they count.
    shrink: the share of their values that is added to the gradient of the others, which with decay `none` makes SR-STE
        (Zhou et al., 2021, arXiv 2102.04010).

    Deviations: the first, dense phase of the paper is left out, since the model is trained already. All matrix products
    become sparse, not feed-forward parts and queries, keys and values alone; the head does not. Learning rates fall by
    a cosine over all phases.
    """

    pattern: str = "2:4"
    decay: Decay = "linear"
    final: float = 0.3
    gradient: Literal["straight-through", "masked"] = "straight-through"
    shrink: float = 0.0

    def __post_init__(self) -> None:
        """Refuses what prune.sparsify does, and shares that are none."""
        super().__post_init__()
        if self.pattern == "unstructured":
            raise SmeltError("pattern is N:M such as 2:4: weights without a pattern do not fade")
        self._sparsify  # noqa: B018  # refuses the pattern
        if not 0 < self.final < 1:
            raise SmeltError(f"final is a share of the updates between 0 and 1, not {self.final}")
        if self.shrink < 0 or (self.shrink and self.gradient == "masked"):
            raise SmeltError("shrink is a weight of at least 0, of gradients that are straight-through")

    def requires(self, program: Program) -> Iterator[str]:
        """A decoder that can be trained, and matrices that are still dense, in rows that the decay can part."""
        yield from super().requires(program)
        yield from self._sparsify.requires(program)
        widest = max(stage.of for stage in self._schedule.stages)
        for name in self._faded(program):
            if program.weights[name].shape[-1] % widest:
                yield f"rows of {name} must be a multiple of {widest}, but have {program.weights[name].shape[-1]}"

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Train, then keep what is largest."""
        if not self._faded(program):
            return self._sparsify.apply(program, None)
        course = Course(self._schedule, self._schedule.last)
        learned = Learned.of(program, ("norms",))
        for name in self._faded(program):
            old = program.weights[name]
            parts = Relative({"data": old.dense()}, ["data"])
            weight = Faded(old.shape, Dense("float32"), parts, course, self.gradient == "straight-through", self.shrink)
            learned.weights[name] = learned.part.weights[name] = weight
            learned.leaves[f"{name}/data"] = parts.leaves["data"]
        whole = self.whole(learned, samples, "tune.fade")
        assert samples is not None
        learner = Thinning(whole, course, torch.zeros((), dtype=torch.int64))
        notes = self.taught(learner, whole, program, samples, learner.settle)
        stored = learned.stored(program.weights)
        program.weights |= stored
        program.touch(*stored)
        made = self._sparsify.apply(program, None)
        return Outcome(tuple(stored), made.skipped, notes)

    @property
    def _sparsify(self) -> Sparsify:
        """What stores the result."""
        return Sparsify(pattern=self.pattern, score="magnitude")

    @property
    def _schedule(self) -> Schedule:
        keep, of = map(int, self.pattern.split(":"))
        return Schedule(Stage(keep, of), self.decay, self.final, self.steps)

    def _faded(self, program: Program) -> tuple[str, ...]:
        """The matrices that become sparse."""
        plan = self._sparsify.plan(program)
        return tuple(name for name, how in plan.items() if not isinstance(how, str))
