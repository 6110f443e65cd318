"""Passes that train on text: the options that all of them have, and the training that these ask for."""

from __future__ import annotations

from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import ClassVar

from ...ir.errors import SmeltError
from ...ir.program import Program
from ..base import Calibration, Effect, Exactness, Pass, Samples
from ._loop import Course, Learner, Trained, identity, train


@dataclass(frozen=True)
class Training(Pass):
    """A pass that trains.

    steps: updates by AdamW, with a short warm-up and a cosine to zero.
    batch: windows of text in an update.
    length: tokens of a window.
    rate: largest learning rate.
    seed: of the order of the windows, and of whatever else is drawn.
    holdout: share of the windows that are not trained on; they decide which weights are kept.
    checks: times that held-out loss is measured, for the curve; the weights of the lowest are kept.
    """

    steps: int = 300
    batch: int = 4
    length: int = 128
    rate: float = 1e-3
    seed: int = 0
    holdout: float = 0.1
    checks: int = 8

    def __post_init__(self) -> None:
        self._course()
        if self.length < 1:
            raise SmeltError(f"length counts from 1, not {self.length}")
        if not 0 < self.holdout < 1:
            raise SmeltError(f"holdout is a share of the text between 0 and 1, not {self.holdout}")

    @property
    def calibration(self) -> Calibration:
        """Text to train on."""
        return "text"

    def train(
        self,
        learner: Learner,
        windows: Sized,
        program: Program,
        samples: Samples,
        what: str,
        settle: Callable[[], None] = lambda: None,
    ) -> Trained:
        """Leave in the learner the weights that do best on held-out text; it learns from these windows of `program`.

        settle: ends each update.
        """
        whose = identity(program, self, samples)
        return train(learner, len(windows), self._course(), samples, what, whose, settle)

    def _course(self) -> Course:
        return Course(self.steps, self.batch, self.rate, seed=self.seed, checks=self.checks)


@dataclass(frozen=True)
class DraftTraining(Training):
    """A pass that trains weights which only draft: the model is frozen, and its logits stay as they are.

    decay: weight of the loss of a guess relative to the guess of the token before it.
    """

    exactness: ClassVar[Exactness] = Exactness.EXACT
    effects: ClassVar[frozenset[Effect]] = frozenset({"decode"})

    decay: float = 0.8
