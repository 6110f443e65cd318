"""Trains a rewritten model towards the one that the recipe began with (Hinton et al., 2015), or on text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from ...ir.errors import SmeltError
from ...ir.ops import HEAD, is_op
from ...ir.program import Program
from ..base import Effect, Exactness, Outcome, Samples, decoder_only
from ..train._text import windows
from ..train._training import Training
from ._learned import Learned
from ._whole import Whole


@dataclass(frozen=True)
class Recover(Training):
    """Wins back what the steps before cost: the model learns the laws of the model that the recipe began with.

    Only what is stored anyway is trained, in the types and encodings that it has, so that no byte is added.

    learn: what is trained. `norms` are vectors, `scales` those (and zeros) of integer codes, and the numbers in
        codebooks and thin factors, `codes` the integers themselves by the straight-through estimator, `dense` matrices
        that are not encoded.
    text: share of the loss that is with the text instead of the first model's laws on their 64 likeliest tokens.
    hidden: weight of the mean squared distance of the states in front of the head, relative to their mean square.
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    effects: ClassVar[frozenset[Effect]] = frozenset({"numerics"})

    learn: tuple[Literal["norms", "scales", "codes", "dense"], ...] = ("norms", "scales")
    text: float = 0.0
    hidden: float = 0.0
    rate: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.learn:
            raise SmeltError("learn names nothing: say norms, scales, codes or dense")
        if not 0 <= self.text <= 1:
            raise SmeltError(f"text is a share of the loss between 0 and 1, not {self.text}")
        if self.hidden < 0:
            raise SmeltError(f"hidden is a weight of at least 0, not {self.hidden}")

    def requires(self, program: Program) -> Iterator[str]:
        """A decoder whose logits come straight from its head."""
        yield from decoder_only(program)
        if not is_op(program.outputs["logits"], HEAD):
            yield f"the logits of {program.name} must come from its head, but something stands behind it"

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Train, and store each part in the type that it had."""
        if samples is None or samples.source is None:
            raise SmeltError("tune.recover needs texts: pass texts to train on, or calibration texts, to compile")
        learn, held = windows(samples, self.length, 2, self.holdout, "tune.recover")
        learned = Learned.of(program, self.learn, samples.source.weights)
        if not learned.leaves:
            return Outcome((), {name: f"nothing in it is {' or '.join(self.learn)}" for name in program.weights})
        whole = Whole.of(samples.source, learned, learn, held, self.text, self.hidden)
        before = whole.check()
        went = self.train(whole, learn, program, samples, "weights")
        stored = learned.stored(program.weights)
        program.weights |= stored
        program.touch(*stored)
        count = sum(value.numel() for value in learned.leaves.values())
        notes = {"loss": {"before": round(before, 4), "after": round(whole.check(), 4)}, "trained": count}
        return Outcome(tuple(stored), notes={**notes, **went.to_dict()})
