"""What a pass is: options, a contract over the Program's state, and one rewrite that accounts for every site."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from ..ir.errors import SmeltError
from ..ir.program import Program

Calibration = Literal["none", "inputs", "text"]  # of `inputs`, texts are one kind
Clock = Callable[[Program, int], float]  # milliseconds of one decode step of a program, behind so many tokens
Effect = Literal["numerics", "shapes", "encodings", "cache", "decode", "choice", "outputs"]


class Exactness(StrEnum):
    """What a pass promises about the Program's outputs."""

    EXACT = "exact"  # equal on probe inputs, up to the order of fp32 sums
    BOUNDED = "bounded"  # an error with a stated bound
    APPROXIMATE = "approximate"  # measured, not promised


@dataclass(frozen=True)
class Checkpoints:
    """Where trainings leave their state: `folder`, or with `key` a folder in it, named by that and what decides it."""

    folder: Path
    key: str | None = None


@dataclass(frozen=True)
class Samples:
    """Calibration data; `progress(done, total, what)` is called by long passes.

    given: tokens int64 [N, T] of texts, or values of a program's inputs by name, [N, …] each.
    training: tokens to train on, [N, T] as well. checkpoints: where trainings can be taken up again; None: nowhere.
    source: the program that the recipe began with. clock: times what a program compiles to; None: nothing does.
    """

    given: torch.Tensor | Mapping[str, torch.Tensor]
    progress: Callable[[int, int, str], None] = field(default=lambda done, total, what: None)
    training: torch.Tensor | None = None
    checkpoints: Checkpoints | None = None
    source: Program | None = None
    clock: Clock | None = None

    def __len__(self) -> int:
        """How many rows there are."""
        return len(next(iter(self.inputs.values())))

    @property
    def inputs(self) -> Mapping[str, torch.Tensor]:
        """By the names of a program's inputs; texts are `tokens`."""
        return {"tokens": self.given} if isinstance(self.given, torch.Tensor) else self.given

    @property
    def tokens(self) -> torch.Tensor:
        """Texts, int64 [N, T]; SmeltError where the samples are none."""
        if "tokens" not in self.inputs:
            raise SmeltError(f"reads sample texts, but the samples are {', '.join(self.inputs)}")
        return self.inputs["tokens"]

    @property
    def amount(self) -> dict[str, int]:
        """How much there is, for a pass's notes."""
        return {"tokens": self.tokens.numel()} if "tokens" in self.inputs else {"samples": len(self)}

    def rows(self, part: slice) -> Samples:
        """Some of the rows."""
        if isinstance(self.given, torch.Tensor):
            return replace(self, given=self.given[part])
        return replace(self, given={name: value[part] for name, value in self.given.items()})

    @property
    def lessons(self) -> torch.Tensor:
        """What is trained on: the training text, else the calibration text."""
        return self.tokens if self.training is None else self.training


@dataclass(frozen=True)
class Outcome:
    """What a pass did: the sites it rewrote, and for each site left alone the reason. `notes` are JSON values."""

    done: tuple[str, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite. Fields are the recipe's options; the file's path is its name (`passes/weights/quantize.py`).

    `requires` yields every unmet fact as a sentence that names the site, what it must be, what it is, and (through
    `Program.changed_by`) the step that made it so. `apply` edits the Program it is given, which is a fork of its own,
    and records what it changed in `program.origin`.
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    effects: ClassVar[frozenset[Effect]] = frozenset()

    @property
    def calibration(self) -> Calibration:
        """Whether it needs samples of text."""
        return "none"

    def requires(self, program: Program) -> Iterator[str]:
        """Facts that do not hold, as sentences; none by default."""
        return iter(())

    @abstractmethod
    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Rewrite `program` in place."""


def decoder_only(program: Program) -> Iterator[str]:
    """The contract of passes that act on generation."""
    if program.facts.get("kind") != "decoder":
        yield f"{program.name} must be a decoder, but is a {program.facts.get('kind', 'plain module')}"
