"""What a recipe is once it is loaded: a header that says where it comes from and what it promises, and its steps."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ..ir.errors import SmeltError
from ..passes import Pass
from ..passes.base import Calibration
from .document import dump

Family = Literal["weights", "prune", "cache", "decode", "tokens", "sample", "attention", "train", "deploy", "baseline"]
FAMILIES: tuple[str, ...] = get_args(Family)


@dataclass(frozen=True)
class Paper:
    """Where a recipe comes from.

    title: the paper's full title.
    year: of its first publication.
    url: where to read it.
    """

    title: str
    year: int
    url: str


@dataclass(frozen=True)
class Needs:
    """What a recipe asks of its user beside the model.

    training: whether it trains weights, which takes time and data.
    calibration: `text` when it measures the model on sample texts, `inputs` when on whatever the model reads.
    images: whether it is for models that read images.
    """

    training: bool = False
    calibration: Calibration = "none"
    images: bool = False

    def union(self, other: "Needs") -> "Needs":
        """What two recipes need together."""
        calibration = max(self.calibration, other.calibration, key=get_args(Calibration).index)
        return Needs(self.training or other.training, calibration, self.images or other.images)


@dataclass(frozen=True)
class Bound:
    """The values of a metric that a recipe promises: `equals`, or `at_most`, `at_least` or both.

    at_most: largest value that keeps the promise.
    at_least: smallest value that keeps the promise.
    equals: the only value that keeps the promise.
    on: what the metric is measured on; the reference model when absent.
    source: where the number comes from.
    """

    at_most: float | None = None
    at_least: float | None = None
    equals: float | None = None
    on: str | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.at_most, self.at_least, self.equals) if value is not None]
        if not given:
            raise SmeltError("give at_most, at_least or equals")
        if self.equals is not None and len(given) > 1:
            raise SmeltError("equals stands alone, without at_most and at_least")
        if not all(map(math.isfinite, given)):
            raise SmeltError("a bound must be finite")
        if self.at_most is not None and self.at_least is not None and self.at_least > self.at_most:
            raise SmeltError(f"at_least {self.at_least} is above at_most {self.at_most}: nothing can satisfy both")

    def holds(self, value: float) -> bool:
        """Whether a measured value keeps the promise; NaN never does."""
        if self.equals is not None:
            return value == self.equals
        return (self.at_most is None or value <= self.at_most) and (self.at_least is None or value >= self.at_least)


@dataclass(frozen=True)
class Gate:
    """What a step may cost before it is undone.

    max_kl: largest divergence of the logits from before the step, in nats.
    min_top1: smallest share of positions whose most likely token stays the same.
    otherwise: `roll-back` undoes the step and goes on, `stop` ends the compile.
    """

    max_kl: float | None = None
    min_top1: float | None = None
    otherwise: Literal["roll-back", "stop"] = "roll-back"

    def __post_init__(self) -> None:
        if self.max_kl is None and self.min_top1 is None:
            raise SmeltError("give max_kl, min_top1 or both")
        if self.max_kl is not None and not 0 <= self.max_kl < math.inf:
            raise SmeltError(f"max_kl must be 0 or more, but is {self.max_kl}")
        if self.min_top1 is not None and not 0 <= self.min_top1 <= 1:
            raise SmeltError(f"min_top1 is a share between 0 and 1, but is {self.min_top1}")


@dataclass(frozen=True)
class Step:
    """One pass with its options, at its place in the recipe.

    `options` holds every option as plain data, defaults included; `pass_` is the pass built from them.
    `name` is the name given in the recipe, else the pass's, with `#1`, `#2` … where it occurs more than once.
    """

    name: str
    pass_name: str
    pass_: Pass
    options: Mapping[str, Any]
    optional: bool = False
    gate: Gate | None = None
    place: str = field(default="", compare=False)

    def content(self) -> dict[str, Any]:
        """What the step does, without its name and place: what a digest covers."""
        extras: dict[str, Any] = {"optional": True} if self.optional else {}
        if self.gate:
            extras["gate"] = _given(vars(self.gate))
        return {self.pass_name: {**self.options, **extras}}

    def to_dict(self) -> dict[str, Any]:
        """The step as it would be written in a recipe."""
        derived = self.name.partition("#")[0] == self.pass_name
        written = self.content()
        return written if derived else {self.pass_name: {"name": self.name, **written[self.pass_name]}}


@dataclass(frozen=True)
class Header:
    """What a recipe says of itself.

    name: by which it is called.
    family: what it changes.
    does: one sentence for someone who has not read the paper.
    paper: the publication it follows.
    deviations: where it departs from the paper.
    needs: what it asks for beside the model.
    expect: the promise, a bound for each metric.
    """

    name: str
    family: Family
    does: str
    paper: Paper | None = None
    deviations: tuple[str, ...] = ()
    needs: Needs = Needs()
    expect: Mapping[str, Bound] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe(Header):
    """A recipe, resolved: includes are spliced in and overrides are applied."""

    steps: tuple[Step, ...] = ()

    def digest(self) -> str:
        """SHA-256 of what the steps do, in hex. Equal for equal options however they were written."""
        content = [step.content() for step in self.steps]
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe as plain data that loads back equal."""
        written: dict[str, Any] = {"name": self.name, "family": self.family}
        if self.paper:
            written["paper"] = dict(vars(self.paper))
        written["does"] = self.does
        if self.deviations:
            written["deviations"] = list(self.deviations)
        written["needs"] = dict(vars(self.needs))
        written["steps"] = [step.to_dict() for step in self.steps]
        if self.expect:
            written["expect"] = {metric: _given(vars(bound)) for metric, bound in self.expect.items()}
        return written

    def to_yaml(self) -> str:
        """The resolved recipe as YAML text that loads back equal."""
        return dump(self.to_dict())


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
