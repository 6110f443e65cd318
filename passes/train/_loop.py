"""The loop of every training: updates by AdamW, a warm-up and a cosine, held-out checks, and states to go on from."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch

from ...ir.errors import SmeltError
from ...ir.program import Program
from ...ir.text import print_program
from ...ir.weight import Weight
from ..base import Pass, Samples
from ._checkpoint import Checkpoint, State, fresh

BETAS = (0.9, 0.95)  # of AdamW; hundreds of updates, not hundreds of thousands


class Learner(Protocol):
    """What is trained: weights, their loss on windows of text, and how good they are on text that is held out."""

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        """By name; float32 leaves that ask for gradients, and what else is kept with them; all are changed in place."""
        ...

    def loss(self, windows: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
        """The mean loss of windows int64 [n], counted within the text to learn; whatever is drawn, is from `chance`."""
        ...

    def check(self) -> float:
        """The loss on text that is held out."""
        ...


@dataclass(frozen=True)
class Course:
    """How a training goes.

    steps: updates. batch: windows in each. rate: largest learning rate. warm: share of the updates in which it rises.
    seed: of the order of the windows and of whatever a learner draws. checks: times that held-out loss is measured.
    """

    steps: int
    batch: int
    rate: float
    warm: float = 0.05
    seed: int = 0
    checks: int = 8

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.checks) < 1:
            raise SmeltError(f"steps, batch and checks count from 1, not {self.steps}, {self.batch}, {self.checks}")
        if not self.rate > 0 or not 0 <= self.warm <= 1:
            raise SmeltError(f"rate must be above 0 and warm a share, not {self.rate} and {self.warm}")

    def rate_at(self, step: int) -> float:
        """The learning rate of update `step`, counted from 1."""
        rise = min(1.0, step / max(1, round(self.warm * self.steps)))
        return self.rate * rise * (1 + math.cos(math.pi * (step - 1) / self.steps)) / 2

    def windows(self, step: int, count: int) -> torch.Tensor:
        """Which of `count` windows update `step` sees; each is seen once before any is seen again."""
        places = range((step - 1) * self.batch, step * self.batch)
        return torch.stack([_order(self.seed, at // count, count)[at % count] for at in places])

    def chance(self, step: int) -> torch.Generator:
        """The source of what is drawn in update `step`, the same whether or not a training was broken off before."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + step)


@dataclass(frozen=True)
class Trained:
    """How a training went.

    kept: the updates behind the weights that were kept, 0 for those from before. resumed: updates that a checkpoint
    brought. curve: after so many updates, the mean loss of the updates since the last point, and the held-out loss.
    """

    kept: int
    resumed: int
    curve: tuple[tuple[int, float | None, float], ...]

    def to_dict(self) -> dict[str, Any]:
        """The notes of a report."""
        points = [[at, None if loss is None else round(loss, 4), round(held, 4)] for at, loss, held in self.curve]
        return {"kept_update": self.kept, "resumed_at": self.resumed, "curve": points}


def identity(program: Program, options: Pass, samples: Samples) -> dict[str, Any]:
    """What decides how a training comes out: the model, the pass's options and the text."""
    bare = [Program("", each.graph, each.weights) for each in (program, program.draft) if each]  # no plans, no history
    model = "".join(map(print_program, bare))
    text = samples.lessons.contiguous()
    return {
        "model": hashlib.sha256(model.encode()).hexdigest(),
        "options": asdict(options),
        "text": hashlib.sha256(f"{list(text.shape)}".encode() + text.numpy().tobytes()).hexdigest(),
    }


def train(
    learner: Learner,
    count: int,
    course: Course,
    samples: Samples,
    what: str,
    identity: Mapping[str, Any],
    settle: Callable[[], None] = lambda: None,
) -> Trained:
    """Leave in the learner the weights of the lowest held-out loss; `count` windows of text are there to learn from.

    what: is trained, for progress and errors. identity: JSON values that decide the outcome, so that a checkpoint is
    taken up by the same training and by no other. settle: ends each update; it may change the weights, and those that
    ask for no gradients are left to it. Raises SmeltError for a checkpoint that is not this training's.
    """
    checkpoint = Checkpoint.of(samples.checkpoints, what, identity)
    state = checkpoint.load(learner.weights) if checkpoint else None
    resumed = state.step if state else 0
    if state is None:
        held = learner.check()
        state = fresh(learner.weights, held)
    optimizer = _optimizer(learner.weights, state)
    checks = {max(1, course.steps * (i + 1) // course.checks) for i in range(course.checks)}
    if state.step:
        samples.progress(state.step, course.steps, f"training {what}")
    try:
        for step in range(state.step + 1, course.steps + 1):
            _update(learner, optimizer, course, step, count, state, settle)
            if step in checks:
                _check(learner, state)
            if checkpoint and (checkpoint.due() or step == course.steps):
                checkpoint.save(state)
            samples.progress(step, course.steps, f"training {what}")
    except KeyboardInterrupt:
        if checkpoint and not state.torn:
            checkpoint.save(state)
        raise
    for name, value in learner.weights.items():
        value.data.copy_(state.best[name])
    return Trained(state.kept, resumed, tuple(state.curve))


def store(learner: Learner, weights: dict[str, Weight]) -> None:
    """Put what was learned into `weights`, each in the type it had; the learner goes on with what that left of it."""
    for name, value in learner.weights.items():
        old = weights[name]
        weights[name] = replace(old, parts=old.encoding.encode(value.detach()))
        value.data.copy_(weights[name].dense())


def _update(
    learner: Learner,
    optimizer: torch.optim.Optimizer,
    course: Course,
    step: int,
    count: int,
    state: State,
    settle: Callable[[], None],
) -> None:
    for group in optimizer.param_groups:
        group["lr"] = course.rate_at(step)
    with torch.enable_grad():
        loss = learner.loss(course.windows(step, count), course.chance(step))
        loss.backward()
    state.torn = True
    optimizer.step()
    optimizer.zero_grad()
    settle()
    state.step, state.since, state.summed = step, state.since + 1, state.summed + float(loss.detach())
    state.torn = False


def _check(learner: Learner, state: State) -> None:
    """A point of the curve; the weights are kept if none were better."""
    state.torn = True
    held = learner.check()
    state.curve.append((state.step, state.summed / state.since, held))
    state.since, state.summed = 0, 0.0
    if held < min(point[2] for point in state.curve[:-1]):
        state.kept = state.step
        for name, value in learner.weights.items():
            state.best[name].copy_(value.detach())
    state.torn = False


def _optimizer(weights: Mapping[str, torch.Tensor], state: State) -> torch.optim.Optimizer:
    """AdamW that reads and writes the moments of `state`."""
    asking = [weights[name] for name in state.moments]
    optimizer = torch.optim.AdamW(asking, betas=BETAS, weight_decay=0.0, fused=True)
    for value, (first, second) in zip(asking, state.moments.values(), strict=True):
        done = torch.tensor(float(state.step))
        optimizer.state[value] = {"step": done, "exp_avg": first, "exp_avg_sq": second}
    return optimizer


@functools.lru_cache(maxsize=2)
def _order(seed: int, round_: int, count: int) -> torch.Tensor:
    """The order of the windows in one round over the text."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + round_))
