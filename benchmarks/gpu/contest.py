"""A contest: one computation done in several ways, each checked before it is timed, all timed in turns.

A check compares with a result of higher precision and must refuse a wrong answer as well; whoever fails it has no time.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch

from .limit import OutOfTime, limit

Outputs: TypeAlias = Sequence[torch.Tensor]
Run: TypeAlias = Callable[[], Outputs]
Found: TypeAlias = dict[str, dict[str, Any]]  # facts by entry
START = 0.7  # of the seconds left: what one entry may take until it is ready to be timed


@dataclass(frozen=True)
class Settings:
    """How all sections run; half: type of activations, rivals: whether others take part, tune: try every tile."""

    device: str
    half: torch.dtype
    tiny: bool = False
    rivals: bool = True
    tune: bool = False


@dataclass(frozen=True)
class Entry:
    """One way: `run` computes, `right` is what it should give, `wrong` computes something that the check must refuse.

    nbytes, flops: the least that any such computation reads and writes, and computes; for the bound. captured: timed as
    a CUDA graph. alone: what is timed in place of `run`, where that does more than the kernel. room: most bytes that a
    run may take beside its inputs. pieces: timed along, without a check.
    """

    run: Run
    right: Outputs
    wrong: Run | None = None
    nbytes: float = 0.0
    flops: float = 0.0
    captured: bool = False
    alone: Run | None = None
    room: float | None = None
    pieces: Mapping[str, Run] = field(default_factory=dict)


@dataclass(frozen=True)
class Bar:
    """What an entry should reach: so many times as fast as the fastest of `rivals`, or such a share of the bound."""

    entry: str
    least: float
    rivals: tuple[str, ...] = ()


Makers: TypeAlias = Mapping[str, Callable[[], Entry]]
Distance: TypeAlias = Callable[[torch.Tensor, torch.Tensor], float]


@dataclass(frozen=True)
class Contest:
    """`prepare` allocates what the entries share and returns what makes each; the names of ours begin with "smelt".

    memory: whether the bytes that a run takes are measured too.
    """

    name: str
    tolerance: float
    prepare: Callable[[], Makers]
    distance: Distance
    bar: Bar | None = None
    memory: bool = False


class Clock(Protocol):
    """What `hold` asks of a clock; `clock.py` has the one that reads CUDA events."""

    def race(self, runs: Mapping[str, Run]) -> dict[str, list[float]]:
        """Seconds of each run, in turns."""

    def captured(self, run: Run) -> tuple[Run, Outputs]:
        """The run as a graph's replay, and what it writes."""

    def peak(self, run: Run) -> int:
        """Most bytes that the run takes at once."""

    def bound(self, nbytes: float, flops: float) -> float:
        """The least seconds for so many bytes and operations."""


def worst(got: torch.Tensor, right: torch.Tensor) -> float:
    """The greatest difference, relative to a value and to the mean size of values; infinite for NaN."""
    wide, want = got.double(), right.double()
    error = (wide - want).abs_() / (want.abs() + want.abs().mean())
    return float(error.nan_to_num_(nan=torch.inf, posinf=torch.inf).max())


def apart(got: torch.Tensor, right: torch.Tensor) -> float:
    """The length of the difference relative to that of the right answer; infinite for NaN."""
    want = right.double()
    error = float((got.double() - want).norm() / want.norm())
    return error if error == error else torch.inf


def equal(got: torch.Tensor, right: torch.Tensor) -> float:
    """The share of entries that differ."""
    return float((got != right).double().mean())


def hold(contest: Contest, clock: Clock | None, seconds: float) -> Found:
    """What is found of each entry: `error`, then times if it passed; or `failed` or `missing`, with the reason."""
    until = time.monotonic() + seconds
    found: Found = {}
    runs: dict[str, Run] = {}
    entries: dict[str, Entry] = {}
    with limit(seconds), _guarded(found.setdefault("smelt", {})):
        makers = contest.prepare()
    if "failed" in found["smelt"]:
        return found
    found.clear()
    for name, make in makers.items():
        facts = found[name] = {}
        share = START * (until - time.monotonic())
        try:
            with limit(share), _guarded(facts):
                entry = entries[name] = make()
                _judge(contest, entry, facts)
                if clock is not None and "failed" not in facts:
                    runs |= _runs(contest, name, entry, clock, facts)
        except OutOfTime:
            facts["missing"] = f"was not ready within {share:.0f} s"
    runs = {name: run for name, run in runs.items() if not {"failed", "missing"} & found[name.split(": ")[0]].keys()}
    if clock is not None and runs:
        try:
            with limit(until - time.monotonic()):
                _time(runs, entries, clock, found)
        except OutOfTime:
            for name in entries.keys() & runs.keys():
                found[name]["untimed"] = "the time was over"
    return found


def release() -> None:
    """Give the memory of the last contest back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _guarded(facts: dict[str, Any]) -> Iterator[None]:
    """An error in here is a result: packages of others may raise anything, and so may a kernel."""
    try:
        yield
    except ImportError as fault:
        facts["missing"] = f"{fault.name or fault} is not installed"
    except Exception as fault:
        lines = str(fault).strip().splitlines()
        facts["failed"] = f"{type(fault).__name__}: {lines[-1] if lines else ''}".strip(": ")[:200]


def _judge(contest: Contest, entry: Entry, facts: dict[str, Any]) -> None:
    error = _error(contest, entry.run(), entry.right)
    facts["error"] = error if math.isfinite(error) else None
    if not error <= contest.tolerance:
        facts["failed"] = f"error {error:.1e} is over {contest.tolerance:.0e}"
    elif entry.wrong is not None and _error(contest, entry.wrong(), entry.right) <= contest.tolerance:
        facts["failed"] = f"a wrong answer passes the check with {contest.tolerance:.0e}"


def _runs(contest: Contest, name: str, entry: Entry, clock: Clock, facts: dict[str, Any]) -> dict[str, Run]:
    """What is timed for an entry: a graph is checked once more, on outputs that it must have written."""
    if contest.memory:
        facts["peak"] = clock.peak(entry.run)
        if entry.room is not None and facts["peak"] > entry.room:
            facts["failed"] = f"takes {facts['peak'] / 1e6:.0f} MB where {entry.room / 1e6:.0f} are enough"
            return {}
    if not entry.captured:
        return {name: entry.alone or entry.run}
    run, outputs = clock.captured(entry.run)
    for output in outputs:
        output.fill_(float("nan"))
    run()
    error = _error(contest, outputs, entry.right)
    if not error <= contest.tolerance:
        facts["failed"] = f"captured, its error {error:.1e} is over {contest.tolerance:.0e}"
        return {}
    return {name: run} | {f"{name}: {piece}": clock.captured(part)[0] for piece, part in entry.pieces.items()}


def _error(contest: Contest, got: Outputs, right: Outputs) -> float:
    if [x.shape for x in got] != [x.shape for x in right]:
        return math.inf
    return max(contest.distance(g, r) for g, r in zip(got, right, strict=True))


def _time(
    runs: Mapping[str, Run], entries: Mapping[str, Entry], clock: Clock, found: dict[str, dict[str, Any]]
) -> None:
    """Race; an error then is no single entry's, so that all lose their times."""
    error: dict[str, Any] = {}
    with _guarded(error):
        for name, seconds in clock.race(runs).items():
            owner, _, piece = name.partition(": ")
            if piece:
                found[owner].setdefault("pieces", {})[piece] = seconds
                continue
            entry = entries[name]
            bound = clock.bound(entry.nbytes, entry.flops)
            found[name] |= {"seconds": seconds, "bound": bound, "nbytes": entry.nbytes, "flops": entry.flops}
    for name in runs if error else ():
        found[name.split(": ")[0]]["failed"] = f"while timed: {next(iter(error.values()))}"
