"""Passes that train weights of the model itself: whom they learn from, and how what they learned is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from ...ir.errors import SmeltError
from ...ir.ops import HEAD, is_op
from ...ir.program import Program
from ..base import Effect, Exactness, Samples, decoder_only
from ..train._loop import Learner
from ..train._text import windows
from ..train._training import Training
from ._learned import Learned
from ._whole import Whole


@dataclass(frozen=True)
class Taught(Training):
    """A pass that trains the model towards the laws of the one that the recipe began with, or on text.

    text: share of the loss that is with the text instead of the first model's laws on their 64 likeliest tokens, the
        others counting as one.
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    effects: ClassVar[frozenset[Effect]] = frozenset({"numerics", "encodings"})

    text: float = 0.0
    rate: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.text <= 1:
            raise SmeltError(f"text is a share of the loss between 0 and 1, not {self.text}")

    def requires(self, program: Program) -> Iterator[str]:
        """A decoder whose logits come straight from its head."""
        yield from decoder_only(program)
        if not is_op(program.outputs["logits"], HEAD):
            yield f"the logits of {program.name} must come from its head, but something stands behind it"

    def whole(self, learned: Learned, samples: Samples | None, name: str, *inside: float) -> Whole:
        """What learns, on windows of the samples; `inside` are weights of what is inside, as `Whole` has them.

        Raises SmeltError, in the name of the pass, where there are no samples.
        """
        if samples is None or samples.source is None:
            raise SmeltError(f"{name} needs texts: pass texts to train on, or calibration texts, to compile")
        learn, held = windows(samples, self.length, 2, self.holdout, name)
        return Whole.of(samples.source, learned, learn, held, self.text, *inside)

    def taught(
        self,
        learner: Learner,
        whole: Whole,
        program: Program,
        samples: Samples,
        settle: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """Train; the notes of the pass. settle: ends each update."""
        before = learner.check()
        went = self.train(learner, whole.learn, program, samples, "weights", settle)
        count = sum(value.numel() for value in learner.weights.values() if value.requires_grad)
        loss = {"before": round(before, 4), "after": round(learner.check(), 4)}
        return {"loss": loss, "trained": count, **went.to_dict()}
