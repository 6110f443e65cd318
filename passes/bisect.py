"""Finds what hurt: the step after which a Program is too far from its source, and the worst sites of that step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..ir.program import Program
from .base import Pass, Samples
from .events import Event, StepDone, StepProgress, ignore
from .manager import Gate, Step, run
from .measure import compare_outputs, observe
from .probe import held_out, probe, reach
from .structure import same_graph

SITES = 32  # each costs a replay


@dataclass(frozen=True)
class StepDamage:
    """A step that stands: how far the Program behind it is from the source, and from the step before."""

    number: int
    name: str
    kl: float
    own_kl: float


@dataclass(frozen=True)
class SiteDamage:
    """A weight, or `cache layer 3`: the KL when it alone is changed in the Program before the step."""

    site: str
    kl: float


@dataclass(frozen=True)
class Bisection:
    """KL by step, the first step that crosses the bound (None: none does), and its worst sites first.

    `note` says why there are no sites, or how many were left out.
    """

    max_kl: float
    steps: tuple[StepDamage, ...]
    guilty: StepDamage | None = None
    sites: tuple[SiteDamage, ...] = ()
    note: str = ""

    @property
    def worst(self) -> StepDamage | None:
        """The step that adds most to the distance from the source."""
        added, before = {}, 0.0
        for step in self.steps:
            added[step] = step.kl - before
            before = step.kl
        return max(added, key=added.__getitem__, default=None)

    def __str__(self) -> str:
        """The steps, the guilty one marked, and below it its sites."""
        lines = [f"{'kl of source':>12}  {'kl of step':>12}  step"]
        for step in self.steps:
            mark = f"  ← first beyond {self.max_kl:g}" if step is self.guilty else ""
            lines.append(f"{step.kl:12.3g}  {step.own_kl:12.3g}  {step.number} {step.name}{mark}")
            if step is self.guilty:
                lines += [f"{'':12}  {site.kl:12.3g}    {site.site}" for site in self.sites]
        return "\n".join([*lines, *([self.note] if self.note else [])])


def bisect(
    program: Program,
    steps: Sequence[Step],
    samples: Samples | None = None,
    max_kl: float = 0.05,
    listen: Callable[[Event], None] = ignore,
) -> Bisection:
    """Run `steps`, and look into the first one behind which KL(source || program) is above `max_kl`.

    Gates that would stop the run do not; those that roll back do, since what they undo hurts nobody.
    """
    found: list[StepDamage] = []
    guilty: tuple[StepDamage, Program, Program] | None = None
    last = program

    def follow(event: Event) -> None:
        nonlocal guilty, last
        listen(event)
        if not isinstance(event, StepDone) or event.report.status != "done":
            return
        report = event.report
        kl, own = (d.kl if d else math.nan for d in (report.from_source, report.divergence))
        found.append(StepDamage(report.number, report.name, kl, own))
        if guilty is None and kl > max_kl:
            guilty = found[-1], last, event.program
        last = event.program

    run(program, [_Unstopped(step) for step in steps], samples, follow)
    if guilty is None:
        return Bisection(max_kl, tuple(found), note=f"no step takes the program beyond a KL of {max_kl:g}")
    step, before, after = guilty
    sites, note = _sites(step, before, after, samples, listen)
    return Bisection(max_kl, tuple(found), step, sites, note)


@dataclass(frozen=True)
class _Unstopped:
    """A step whose gate does not end the run."""

    step: Step

    @property
    def name(self) -> str:
        return self.step.name

    @property
    def pass_name(self) -> str:
        return self.step.pass_name

    @property
    def pass_(self) -> Pass:
        return self.step.pass_

    @property
    def options(self) -> Mapping[str, Any]:
        return self.step.options

    @property
    def optional(self) -> bool:
        return self.step.optional

    @property
    def gate(self) -> Gate | None:
        return None if self.step.gate is None or self.step.gate.otherwise == "stop" else self.step.gate

    @property
    def place(self) -> str:
        return self.step.place


def _sites(
    step: StepDamage, before: Program, after: Program, samples: Samples | None, listen: Callable[[Event], None]
) -> tuple[tuple[SiteDamage, ...], str]:
    """The damage of each changed weight and cache site alone, worst first; the largest SITES of them."""
    if not same_graph(before, after):
        return (), f"{step.name} rewrites the graph, so that its sites cannot be tried one at a time"
    swaps = sorted(_swaps(before, after), key=lambda swap: -swap[1])
    if not swaps:
        return (), f"{step.name} changes no weight and no cache site"
    unseen = None if samples is None else held_out(samples)[1].inputs
    asked = probe(before, unseen, reach(after.cache))
    reference = observe(before, asked)
    damages = []
    for done, (site, _, swapped) in enumerate(swaps[:SITES]):
        listen(StepProgress(step.number, step.name, done, min(len(swaps), SITES), site))
        damages.append(SiteDamage(site, compare_outputs(reference, observe(swapped, asked)).kl))
    left = len(swaps) - SITES
    note = f"the {left} smallest sites of {step.name} were not tried" if left > 0 else ""
    return tuple(sorted(damages, key=lambda damage: -damage.kl)), note


def _swaps(before: Program, after: Program) -> Iterator[tuple[str, int, Program]]:
    """Each site that the step changed, its size, and the Program before the step with this site alone changed."""
    for name, weight in after.weights.items():
        old = before.weights.get(name)
        if old is not None and old is not weight and old.shape == weight.shape:
            swapped = before.fork()
            swapped.weights[name] = weight
            yield name, math.prod(weight.shape), swapped
    if before.cache is None or after.cache is None:
        return
    for site in after.cache.sites:
        if site != before.cache[site.layer]:
            swapped = before.fork()
            swapped.cache = before.cache.with_site(site)
            yield f"cache layer {site.layer}", site.kv_heads * (site.key_dim + site.value_dim), swapped
