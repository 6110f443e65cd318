"""The pass manager: runs a recipe's steps over a Program, holds each to its contract and measures what it cost."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ..ir.errors import SmeltError, nearest
from ..ir.program import Program, Record
from ..ir.verify import verify
from .base import Exactness, Outcome, Pass, Samples
from .events import Event, StepDone, StepProgress, StepRolledBack, StepStarted, ignore
from .measure import Divergence
from .probe import held_out
from .report import Report, Status, StepReport, reasons
from .witness import TOLERANCE, Witness

CONTEXT = 1024  # tokens, at which cache bits per value are reported


class Gate(Protocol):
    """What a step may cost: see `recipes/schema.py`."""

    @property
    def max_kl(self) -> float | None: ...
    @property
    def min_top1(self) -> float | None: ...
    @property
    def otherwise(self) -> str: ...


class Step(Protocol):
    """One pass with its options, at its place in a recipe: see `recipes/schema.py`."""

    @property
    def name(self) -> str: ...
    @property
    def pass_name(self) -> str: ...
    @property
    def pass_(self) -> Pass: ...
    @property
    def options(self) -> Mapping[str, Any]: ...
    @property
    def optional(self) -> bool: ...
    @property
    def gate(self) -> Gate | None: ...
    @property
    def place(self) -> str: ...


@dataclass(frozen=True)
class Result:
    """The last good Program and what each step did."""

    program: Program
    report: Report


class StepFailed(SmeltError):
    """A step that could not stand; `program` is the last good one, `report` ends with the failed step."""

    def __init__(self, message: str, program: Program, report: Report) -> None:
        super().__init__(message)
        self.program, self.report = program, report


def run(
    program: Program,
    steps: Sequence[Step],
    samples: Samples | None = None,
    listen: Callable[[Event], None] = ignore,
    stop_after: str | None = None,
) -> Result:
    """Run `steps` in order, up to and including the step named `stop_after`; `program` itself stays as it is.

    Raises StepFailed for a contract that does not hold, a step that matches nothing, a graph that does not verify, a
    promise that a pass breaks, and a gate that says stop. Any other exception is a bug in the pass, and carries a note
    that names the step.
    """
    names = [step.name for step in steps]
    if stop_after is not None and stop_after not in names:
        raise SmeltError(f"no step is named '{stop_after}'{nearest(stop_after, names)}; steps: {', '.join(names)}")
    if stop_after is not None:
        steps = steps[: names.index(stop_after) + 1]
    return _Run(program, samples, listen).all(steps)


class _Run:
    """One run: the last good Program, the reports so far, and the outputs to which the next step is compared."""

    def __init__(self, program: Program, samples: Samples | None, listen: Callable[[Event], None]) -> None:
        self.program, self.source, self.listen = program, program, listen
        self.reports: list[StepReport] = []
        self.first = 1 + max((record.step for record in program.history), default=0)
        self.samples, unseen = samples, None
        if samples is not None:
            self.samples, unseen = held_out(samples)
        self.witness = Witness(program, unseen.inputs if unseen else None)

    @property
    def report(self) -> Report:
        return Report(self.program.name, tuple(self.reports))

    def all(self, steps: Sequence[Step]) -> Result:
        for number, step in enumerate(steps, self.first):
            self.listen(StepStarted(number, self.first + len(steps) - 1, step.name, step.pass_name))
            attempt = _Attempt(number, step, self.program)
            with self._blamed(attempt):
                self._one(attempt)
        return Result(self.program, self.report)

    def _one(self, attempt: _Attempt) -> None:
        step, after = attempt.step, attempt.after
        if unmet := list(step.pass_.requires(after)):
            raise SmeltError("; ".join(unmet))
        samples = self._samples_for(attempt)
        with attempt.timed("seconds"):
            attempt.outcome = step.pass_.apply(after, samples)
        if not attempt.outcome.done:
            if not step.optional:
                raise SmeltError(_matched_nothing(attempt.outcome))
            self._settle(attempt, "nothing to do")
            return
        with attempt.timed("measuring"):
            verify(after)
            self._measure(attempt)
        if step.gate and (why := _closed(step.gate, attempt.divergence)):
            if step.gate.otherwise == "stop":
                raise SmeltError(f"stopped by its gate: {why}; loosen the gate, or ask less of the step")
            self._settle(attempt, "rolled back", why)
            return
        if attempt.divergence and not attempt.divergence.finite:
            raise SmeltError("makes outputs that are not finite; a gate with `otherwise: roll-back` would undo it")
        self._settle(attempt, "done")

    def _samples_for(self, attempt: _Attempt) -> Samples | None:
        step, samples = attempt.step, self.samples
        if samples is None:
            if step.pass_.calibration != "none":
                raise SmeltError(
                    "calibrates on samples, and there are none: give texts with --calibration FILE, or calibration="
                )
            return None
        asked = samples.progress

        def progress(done: int, total: int, what: str) -> None:
            asked(done, total, what)
            self.listen(StepProgress(attempt.number, step.name, done, total, what))

        return replace(samples, progress=progress, source=self.source)

    def _measure(self, attempt: _Attempt) -> None:
        """Hold the pass to its effects and exactness, and record its divergence."""
        effects, before, after = attempt.step.pass_.effects, self.program, attempt.after
        if changed := [effect for effect in _changes(before, after) if effect not in effects]:
            raise SmeltError(
                f"changes the program's {' and '.join(changed)}, but declares only the effects "
                f"{sorted(effects)}: a fault in the pass"
            )
        self.listen(StepProgress(attempt.number, attempt.step.name, 0, 0, "measuring"))
        attempt.divergence = self.witness.compare(before, after, reshaped="shapes" in effects)
        attempt.from_source = self.witness.from_source
        if after.cache != before.cache and (shallow := self.witness.shallow(after)):
            attempt.remarks["probe"] = shallow
        exact = attempt.step.pass_.exactness is Exactness.EXACT
        if attempt.divergence is None or not (exact or effects <= {"decode", "choice", "outputs"}):
            return
        error = attempt.divergence.max_error
        if error > TOLERANCE and not self.witness.same_on_dense_cache(before, after):
            claim = "claims exact" if exact else f"declares only the effects {sorted(effects)}"
            raise SmeltError(
                f"{claim} but differs by {error:.1e} (relative, allowed {TOLERANCE:.0e}): a fault in the pass"
            )

    def _settle(self, attempt: _Attempt, status: Status, why: str = "") -> None:
        """Write the step down, and move on to its Program if it stands."""
        report = attempt.report(status, why)
        plain = report.to_dict()
        json.dumps(plain, allow_nan=False)  # an artefact keeps it: better to fail here than after an hour
        if status == "done":
            self.program = attempt.accepted(plain)
            self.witness.accept()
        self.reports.append(report)
        event = StepRolledBack if status == "rolled back" else StepDone
        self.listen(event(report, self.program))

    @contextmanager
    def _blamed(self, attempt: _Attempt) -> Iterator[None]:
        """Every failure names the step; one that is the user's to mend carries what stands so far."""
        try:
            yield
        except SmeltError as fault:
            self.reports.append(attempt.report("failed", str(fault)))
            raise StepFailed(f"{attempt.where}: {fault}", self.program, self.report) from fault
        except Exception as fault:
            fault.add_note(f"in {attempt.where}: this is a bug in the pass; the program before it is unharmed")
            raise


class _Attempt:
    """One step while it runs: the fork that it edits, and what is known of it so far."""

    def __init__(self, number: int, step: Step, before: Program) -> None:
        self.number, self.step, self.before, self.after = number, step, before, before.fork()
        self.outcome = Outcome(())
        self.divergence: Divergence | None = None
        self.from_source: Divergence | None = None
        self.took = {"seconds": 0.0, "measuring": 0.0}
        self.remarks: dict[str, Any] = {}

    @property
    def where(self) -> str:
        """`recipe.yaml:12: step 3, cache.encode`."""
        place = f"{self.step.place}: " if self.step.place else ""
        return f"{place}step {self.number}, {self.step.name}"

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.took[what] += time.perf_counter() - start

    def report(self, status: Status, why: str = "") -> StepReport:
        tried = self.after if status in ("done", "rolled back") else self.before
        return StepReport(
            self.number,
            self.step.name,
            self.step.pass_name,
            status,
            self.outcome.done,
            dict(self.outcome.skipped),
            (self.before.nbytes, tried.nbytes),
            (_cache_bits(self.before), _cache_bits(tried)),
            self.divergence,
            self.from_source,
            **self.took,
            why=why,
            notes={**self.outcome.notes, **self.remarks},
        )

    def accepted(self, report: dict[str, Any]) -> Program:
        """The rewritten Program with the step in its history, as the origin of everything that it changed."""
        record = Record(self.number, self.step.pass_name, dict(self.step.options), report)
        changed = {name for name, w in self.after.weights.items() if self.before.weights.get(name) is not w}
        changed |= self.after.touched | {plan for plan in _changes(self.before, self.after) if plan != "outputs"}
        return replace(
            self.after,
            history=(*self.before.history, record),
            origin=self.after.origin | dict.fromkeys(changed, record),
            touched=set(),
        )


def _changes(before: Program, after: Program) -> Iterator[str]:
    """Which of the effects that can be told without running anything took place."""
    if before.cache != after.cache:
        yield "cache"
    if before.decode != after.decode or before.depth != after.depth:
        yield "decode"
    if before.choice != after.choice:
        yield "choice"
    if before.outputs.keys() != after.outputs.keys():
        yield "outputs"


def _matched_nothing(outcome: Outcome) -> str:
    left = "; ".join(reasons(outcome.skipped)) or "the program has no site of this kind"
    return f"matched nothing: {left}. Say `optional: true` if that is fine"


def _closed(gate: Gate, divergence: Divergence | None) -> str:
    """Why a step does not pass its gate, or an empty string."""
    if divergence is None or (divergence.finite and math.isnan(divergence.kl)):
        raise SmeltError("has a gate, but there are no logits to hold it to: gates are for programs that give logits")
    why = []
    if gate.max_kl is not None and not divergence.kl <= gate.max_kl:
        why.append(_beyond("kl", divergence.kl, ">", gate.max_kl))
    if gate.min_top1 is not None and not divergence.top1 >= gate.min_top1:
        why.append(_beyond("top-1", divergence.top1, "<", gate.min_top1))
    return ", ".join(why)


def _beyond(what: str, value: float, sign: str, bound: float) -> str:
    """`kl 0.031 > 0.02`, with more digits where two would look equal."""
    digits = next((d for d in (2, 4, 8) if f"{value:.{d}g}" != f"{bound:.{d}g}"), 17)
    return f"{what} {value:.{digits}g} {sign} {bound:g}"


def _cache_bits(program: Program) -> float | None:
    return None if program.cache is None else float(program.cache.bits_per_value(CONTEXT))
