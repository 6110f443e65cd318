"""Trains a rewritten model towards the one that the recipe began with (Hinton et al., 2015), or on text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from ...ir.errors import SmeltError
from ...ir.program import Program
from ..base import Effect, Outcome, Samples
from ._attention import SITES
from ._learned import Learned
from ._taught import Taught


@dataclass(frozen=True)
class Recover(Taught):
    """Wins back what the steps before cost: the model learns the laws of the model that the recipe began with.

    Only what is stored anyway is trained, in the types and encodings that it has, so that no byte is added.

    learn: what is trained. `norms` are vectors, `scales` those (and zeros) of integer codes, and the numbers in
        codebooks and thin factors, `codes` the integers themselves by the straight-through estimator, and numbers of
        entries, `dense` matrices that are not encoded.
    hidden: weight of the mean squared distance of the states in front of the head, relative to their mean square.
    attention: weight of 1 - cos between maps of attention and those of the first model.
    entropy: weight of -½ log(1 + var) over the channels of queries and keys, which keeps them spread out.
    changes: share of a matrix's codes that may change in an update, those that are to move farthest (PV-Tuning,
        Malinovskii et al., 2024, arXiv 2405.14852); where it is 1, integers learn straight through, as those of
        8 bits always do.
    """

    effects: ClassVar[frozenset[Effect]] = frozenset({"numerics"})

    learn: tuple[Literal["norms", "scales", "codes", "dense"], ...] = ("norms", "scales")
    hidden: float = 0.0
    attention: float = 0.0
    entropy: float = 0.0
    changes: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.learn:
            raise SmeltError("learn names nothing: say norms, scales, codes or dense")
        if not 0 < self.changes <= 1:
            raise SmeltError(f"changes is a share of the codes above 0 and at most 1, not {self.changes}")
        for name in ("hidden", "attention", "entropy"):
            if getattr(self, name) < 0:
                raise SmeltError(f"{name} is a weight of at least 0, not {getattr(self, name)}")

    def requires(self, program: Program) -> Iterator[str]:
        """A decoder whose logits come straight from its head, and which attends where attention counts."""
        yield from super().requires(program)
        if (self.attention or self.entropy) and not any(program.calls(*SITES)):
            yield f"{program.name} must attend to something for the weights of attention and entropy, but does not"

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Train, and store each part in the type that it had."""
        source = {} if samples is None or samples.source is None else samples.source.weights
        learned = Learned.of(program, self.learn, source, self.changes)
        if not learned.leaves:
            return Outcome((), {name: f"nothing in it is {' or '.join(self.learn)}" for name in program.weights})
        whole = self.whole(learned, samples, "tune.recover", self.hidden, self.attention, self.entropy)
        assert samples is not None
        notes = self.taught(whole, whole, program, samples, learned.settle)
        stored = learned.stored(program.weights)
        program.weights |= stored
        program.touch(*stored)
        return Outcome(tuple(stored), notes=notes)
