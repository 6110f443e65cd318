"""What SMELT_DEBUG prints to stderr: passes, rewrites, skips, kernel choices, generated source and graphs."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from .ir.errors import SmeltError
from .ir.text import print_program
from .passes.events import Event, StepDone, StepRolledBack, StepStarted

if TYPE_CHECKING:
    from .codegen.plan import Plan

PASSES, REWRITES, CHOICES, SOURCE, GRAPHS = 1, 2, 3, 4, 5


def level() -> int:
    """The number in SMELT_DEBUG, 0 where it is unset."""
    text = os.environ.get("SMELT_DEBUG") or "0"
    if text not in ("0", "1", "2", "3", "4", "5"):
        raise SmeltError(f"SMELT_DEBUG is '{text}'; give a level from 0 (nothing) to 5 (everything)")
    return int(text)


def tell(event: Event) -> None:
    """A listener of the pass manager that prints what the level asks for."""
    shown = level()
    if shown < PASSES:
        return
    if isinstance(event, StepStarted):
        _say(f"step {event.number} of {event.total}, {event.name} ({event.pass_name})")
        return
    if not isinstance(event, StepDone | StepRolledBack):
        return
    report = event.report
    _say(
        f"step {report.number}, {report.name}: {report.status}, {len(report.done)} sites, "
        f"{len(report.skipped)} left alone, {report.seconds:.2f} s, measuring {report.measuring:.2f} s"
    )
    if shown >= REWRITES:
        for site in report.done:
            _say(f"  rewrote {site}")
    if shown >= CHOICES:
        for site, why in report.skipped.items():
            _say(f"  left {site}: {why}")
    if shown >= GRAPHS:
        _say(print_program(event.program, hashes=False))


def tell_kernels(plan: Plan) -> None:
    """Print which kernel runs each node and why, and each generated source once."""
    shown = level()
    if shown < CHOICES:
        return
    for row in plan.kernels():
        _say(f"{row['node']}: {row['kernel']}{' (fallback)' if row['fallback'] else ''}: {row['why']}")
    if shown >= SOURCE:
        sources = {row["kernel"]: row["source"] for row in plan.kernels()}
        for name, source in sources.items():
            _say(f"--- {name}\n{source}")


def _say(text: str) -> None:
    print(text, file=sys.stderr)
