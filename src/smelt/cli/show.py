"""What commands print: aligned columns for people, JSON for programs, and a line that moves while one waits."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..passes.events import Event


def columns(rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """Rows as text in aligned columns; a column that is empty in every row but the first is left out."""
    kept = [i for i in range(len(rows[0])) if len(rows) == 1 or any(row[i] for row in rows[1:])]
    widths = [max(len(row[i]) for row in rows) for i in kept]
    lines = ("  ".join(row[i].ljust(width) for i, width in zip(kept, widths, strict=True)) for row in rows)
    return "\n".join(f"{indent}{line}".rstrip() for line in lines)


def emit(data: Any) -> None:
    """Print JSON; what is not a number is null."""
    print(json.dumps(_plain(data), indent=1, ensure_ascii=False, allow_nan=False))


def number(value: float | None) -> str:
    """Four digits, or `-` for what was not measured."""
    if value is None or math.isnan(value):
        return "-"
    if 0 < abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def size(count: int) -> str:
    """Bytes in words: `11.5 MB`."""
    from ..passes.report import size

    return size(count)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


class Waiting:
    """A moving line on stderr that says what is done; `tell` is a listener of the pass manager."""

    def __init__(self, say: Any) -> None:
        self._say = say
        self._of = ""

    def say(self, what: str, done: int = 0, total: int = 0) -> None:
        """Say what is being done, and how much of it."""
        self._say(what, done, total)

    def tell(self, event: Event) -> None:
        """Follow the steps of a recipe."""
        from ..passes.events import StepProgress, StepStarted

        if isinstance(event, StepStarted):
            self._of = f"step {event.number} of {event.total}, {event.name}"
            self.say(self._of)
        elif isinstance(event, StepProgress):
            self.say(f"{self._of}: {event.what}", event.done, event.total)


@contextmanager
def waiting(what: str, quiet: bool = False) -> Iterator[Waiting]:
    """Show a moving line while the body runs; nothing at all where stderr is no terminal, or `quiet`."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield Waiting(lambda what, done, total: None)
        return
    bar = BarColumn(bar_width=24)
    with Progress(
        SpinnerColumn(), TimeElapsedColumn(), bar, TextColumn("{task.description}", markup=False),
        console=console, transient=True,
    ) as progress:  # fmt: skip
        task = progress.add_task(what, total=None)

        def say(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total or None)

        yield Waiting(say)


def note(text: str) -> None:
    """A remark on stderr, beside what a program may read from stdout."""
    print(text, file=sys.stderr)
