"""What the manager tells a listener while it runs, so that a command line can draw progress and print graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from ..ir.program import Program
from .report import StepReport


@dataclass(frozen=True)
class StepStarted:
    """Step `number` of `total` begins; `name` is the step's."""

    number: int
    total: int
    name: str
    pass_name: str


@dataclass(frozen=True)
class StepProgress:
    """A long pass is at `done` of `total`, or the manager began something long itself (`total` 0)."""

    number: int
    name: str
    done: int
    total: int
    what: str


@dataclass(frozen=True)
class StepDone:
    """A step is over and stands; `program` is the Program behind it."""

    report: StepReport
    program: Program


@dataclass(frozen=True)
class StepRolledBack:
    """A step's gate failed and the step was undone; `program` is the Program before it."""

    report: StepReport
    program: Program


Event: TypeAlias = StepStarted | StepProgress | StepDone | StepRolledBack


def ignore(event: Event) -> None:
    """The listener that does not listen."""
