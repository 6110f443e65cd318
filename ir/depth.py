"""The depth plan: which parts of a model run for a generated token (SkipDecode, 2023; FFN-SkipLLM, 2024)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from .cache.plan import CachePlan
from .errors import SmeltError


@dataclass(frozen=True)
class Stage:
    """From generated token `start` on, these layers run without their attention or without their feed-forward part.

    Layers count from 0, and so do generated tokens, each in the step that reads it: what stands behind the prompt is
    token 0, and was chosen by the whole model.
    """

    start: int
    attention: tuple[int, ...] = ()
    feedforward: tuple[int, ...] = ()


@dataclass(frozen=True)
class DepthPlan:
    """Stages in the order of their starts. Prompts, and what is generated before the first stage, run the whole model.

    A layer whose attention rests stores no keys and values, so it rests to the end: what a token attends to is there.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        starts = [stage.start for stage in self.stages]
        if not starts or starts[0] < 0 or any(a >= b for a, b in pairwise(starts)):
            raise SmeltError(f"depth plan: stages start at growing numbers of tokens from 0, not at {starts}")
        for before, after in pairwise(self.stages):
            if back := sorted(set(before.attention) - set(after.attention)):
                raise SmeltError(
                    f"depth plan: layer {back[0]} rests from token {before.start} on, so it stores nothing that token "
                    f"{after.start} could attend to: leave its attention out of all later stages"
                )

    def at(self, generated: int) -> int:
        """Which stage, counted from 1, reads generated token `generated`; 0 is the whole model."""
        return bisect_right([stage.start for stage in self.stages], generated)

    def left(self, generated: int) -> int | None:
        """How many tokens from this one on are read in the same stage; None: all that follow."""
        after = [stage.start for stage in self.stages[self.at(generated) :]]
        return after[0] - generated if after else None

    def faults(self, cache: CachePlan | None) -> Iterator[str]:
        """What of a cache needs a layer that rests while the layers that read it do not."""
        before = None
        for site in cache.sites if cache is not None else ():
            source = before if site.predict is not None and not site.predict.first else None
            if site.retrieve is not None and site.retrieve.by == "reuse":
                source = site.retrieve.source
            if any(source in stage.attention and site.layer not in stage.attention for stage in self.stages):
                what = "stores what a forecast from" if site.predict is not None else "reads the list of"
                yield f"layer {site.layer} {what} layer {source}, whose attention is left out while its own is not"
            before = site.layer

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"stages": [{**asdict(s), "attention": list(s.attention), "feedforward": list(s.feedforward)}
                           for s in self.stages]}  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DepthPlan:
        """Inverse of `to_dict`."""
        told = data["stages"]
        return cls(tuple(Stage(int(s["start"]), tuple(s["attention"]), tuple(s["feedforward"])) for s in told))
