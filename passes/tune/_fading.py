"""Weights that fade until N of every M neighbours are left, and the course of that (Bambhaniya et al., 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ...ir.weight import Weight
from ..prune._masks import Pattern
from ._whole import Whole

Decay = Literal["linear", "exponential", "stepwise", "geometric", "none"]
LEAST = 0.01  # what the others count when an exponential decay ends
STEP = "course/update"  # of what is kept with the weights: the updates that were made


@dataclass(frozen=True)
class Stage:
    """`keep` of every `of` neighbours are whole, and the others count `share` of what they are."""

    keep: int
    of: int
    share: float = 0.0

    def factor(self, value: torch.Tensor) -> torch.Tensor:
        """What each element of a matrix [N, K] counts, by the magnitudes in it."""
        return torch.where(Pattern(keep=self.keep, of=self.of).removed(value.abs()), self.share, 1.0)


@dataclass(frozen=True)
class Schedule:
    """The stages of `steps` updates; the last share `final` of them is at the one that stays."""

    last: Stage
    decay: Decay
    final: float
    steps: int

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Those that the decay begins at, in order, and the last."""
        keep, of = self.last.keep, self.last.of
        if self.decay == "geometric":
            return *(Stage(keep * wider, of * wider) for wider in (8, 4, 2)), self.last
        if self.decay == "stepwise":
            halves = [of >> power for power in range(1, of.bit_length()) if of >> power > keep]
            return Stage(of - 1, of), *(Stage(half, of) for half in halves), self.last
        return (self.last,)

    def at(self, update: int) -> Stage:
        """That of an update, counted from 0."""
        gone = update / max(1.0, self.steps * (1 - self.final))  # share of the decay
        if gone >= 1 or self.decay == "none":
            return self.last
        if self.decay == "linear":
            return replace(self.last, share=1 - gone)
        if self.decay == "exponential":
            return replace(self.last, share=LEAST**gone)
        frames = self.stages[:-1]
        return frames[int(gone * len(frames))]


@dataclass
class Course:
    """A schedule, and the stage that it is at."""

    schedule: Schedule
    stage: Stage


@dataclass(frozen=True, eq=False)
class Faded(Weight):
    """A dense matrix of which the course says what counts.

    straight: gradients reach all elements as if they were whole. shrink: what is added to the gradient of those that
    are not, as a share of their values (SR-STE, Zhou et al., 2021, arXiv 2102.04010).
    """

    course: Course
    straight: bool
    shrink: float

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix as it counts."""
        value = self.parts["data"]
        factor = self.course.stage.factor(value.detach())
        if not self.straight:
            return (value * factor).to(dtype)
        if self.shrink and value.requires_grad:
            extra = self.shrink * value.detach() * (factor < 1)
            value.register_hook(lambda gradient: gradient + extra)
        return (value + (value * factor - value).detach()).to(dtype)


@dataclass(frozen=True)
class Thinning:
    """A `Learner` of a whole model whose weights fade; it is checked as it will be in the end."""

    whole: Whole
    course: Course
    update: torch.Tensor

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        """The leaves, and the count of updates, so that a training that is taken up knows its stage."""
        return {**self.whole.weights, STEP: self.update}

    def loss(self, windows: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
        """The mean over places, in nats, at the stage of this update."""
        self.course.stage = self.course.schedule.at(int(self.update))
        return self.whole.loss(windows, chance)

    def check(self) -> float:
        """That of the pattern that stays, on text that is held out."""
        self.course.stage = self.course.schedule.last
        return self.whole.check()

    def settle(self) -> None:
        """The end of an update."""
        self.update.add_(1)
