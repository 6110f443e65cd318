"""Takes out what passes least on through noisy gates (VTrans, Dutta et al. 2024, arXiv:2406.05276)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from ...ir.errors import SmeltError
from ...ir.program import Program
from ...ir.shapes import derive
from .._walk import Walk
from ..base import Effect, Exactness, Outcome, Samples
from ..tune._learned import Learned
from ..tune._taught import Taught
from ..weights._matrices import all_dense
from ._bottleneck import Drawn, Gates
from ._gates import KINDS, Kind, find_places, gated
from ._size import Measure, Size, slices
from ._trace import shape_of
from .drop import droppable

_FACT = "full"  # the fact that keeps the size before anything was removed, by measure


@dataclass(frozen=True)
class Bottleneck(Taught):
    """Multiplies parts of the model by gates μ + σ ε, trains these against the model as it was, and removes units.

    The loss is the cross-entropy with the laws of the model that the recipe began with, `information` times the sum of
    ½ log(1 + μ²/σ²) over all gates, and a multiplier for the expected size, in which a unit counts with μ² / (μ² + σ²).
    Then the units of the largest σ²/μ² leave until the size is met, and μ of the others goes into smaller matrices.

    share: how much is to be removed.
    of: what it is a share of: stored `parameters`, or `operations`, the numbers that a token is multiplied with.
    gates: what can be removed: `neurons`; `heads`, keys and values with all their queries; `blocks`, attention and
        feed-forward parts; `width`, channels of the residual stream, whose RMSNorms then count fewer.
    correct: whether what reads neurons and heads is fitted to what it read before, as in prune.interpolate, and μ is
        left out.
    information: weight of what the gates let pass, in nats.
    multiple: channels left at a place are a multiple of this, for encodings that store columns in groups.

    Shares are of the model before its first such step: a second run finds nothing left to do.

    Deviations: weights stay as they are, as in the paper's Faster-VTrans; tune.recover behind it trains what is left.
    One gate stands for a key-value head. Noise starts at a variance of e⁻⁴.
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    effects: ClassVar[frozenset[Effect]] = frozenset({"numerics", "shapes"})

    share: float = 0.3
    of: Measure = "parameters"
    gates: tuple[Kind, ...] = KINDS
    correct: bool = False
    information: float = 2e-5
    multiple: int = 32
    rate: float = 2e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share < 1:
            raise SmeltError(f"share is above 0 and below 1, but is {self.share}")
        if not self.gates:
            raise SmeltError(f"gates names nothing: say {', '.join(KINDS)}")
        if self.information < 0 or self.multiple < 1:
            raise SmeltError(
                f"information is at least 0 and multiple at least 1, not {self.information} and {self.multiple}"
            )

    def requires(self, program: Program) -> Iterator[str]:
        """A dense decoder whose logits come straight from its head, without a cache or drafts."""
        yield from super().requires(program)
        yield from droppable(program, "prune.bottleneck")
        if program.cache is not None:
            since = program.changed_by("cache")
            yield f"prune.bottleneck must come before the cache is inserted{since}: heads and blocks may leave"
        yield from all_dense(program, list(program.weights))

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Train the gates, then remove."""
        places, skipped = find_places(program, self.gates)
        if not places:
            return Outcome((), skipped)
        size, before = Size.of(program, places, self.of), program.nbytes
        known = program.facts.get(_FACT, {})
        limit = (1 - self.share) * known.get(self.of, size.full)
        if size.full <= limit:
            return Outcome((), {place.name: f"{size.full:.0f} {self.of} are left already" for place in places})
        part, names = gated(program, places)
        learned = Learned.of(part, ())
        drawn = [Drawn(len(shape_of(place.reads[0][1]))) for place in places]
        for name, each in zip(names, drawn, strict=True):
            learned.part.weights[name] = replace(learned.part.weights[name], parts=each)
        whole = self.whole(learned, samples, "prune.bottleneck")
        assert samples is not None
        gates = Gates.of(whole, places, drawn, size, limit, self.multiple, self.information)
        notes = self.taught(gates, whole, program, samples)
        kept = gates.kept()
        factors = torch.ones_like(gates.mean) if self.correct else gates.mean.detach()
        walk = Walk(program, samples) if self.correct else None
        left: dict[str, Any] = {}
        for place, units in zip(places, slices(places), strict=True):
            place.leave(program, kept[units], factors[units], walk)
            left[place.name] = {"left": int(kept[units].sum()), "of": int(kept[units].numel())}
        program.touch(*program.weights)
        program.facts[_FACT] = {**known, self.of: known.get(self.of, size.full)}
        derive(program)
        sizes: dict[str, Any] = {self.of: {"before": size.full, "after": float(size(kept))}}
        sizes["bytes"] = {"before": before, "after": program.nbytes}
        return Outcome(tuple(left), skipped, {"left": left, **sizes, **notes})
