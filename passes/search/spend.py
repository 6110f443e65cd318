"""Spends a budget where it counts most, found by evolution (EvoPress, Sieberling et al. 2024, arXiv:2410.14649)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import ClassVar, Literal

from ...ir.blocks import blocks
from ...ir.cache.plan import Site as CacheSite
from ...ir.encoding import Encoding
from ...ir.errors import SmeltError
from ...ir.program import Program
from .._contracts import cached_decoder
from .._finished import Finished
from ..base import Calibration, Effect, Exactness, Outcome, Pass, Samples, decoder_only
from ..cache.encode import Encode
from ..prune.drop import droppable
from ..weights._matrices import all_dense
from ._additive import additive, alone, outdone
from ._budget import Budget, Purse, Resource, resources
from ._clock import milliseconds
from ._evolve import Course, Stage, evolve
from ._exhaustive import exhaustive
from ._journal import Journal
from ._judge import Judge
from ._levels import Solver, choices, made
from ._scores import Scores
from ._space import Candidate, Site, Space, Stored, block_sites
from ._workers import workers

WEIGHED = 1024  # tokens of a cache by which its levels are put in order


@dataclass(frozen=True)
class Spend(Pass):
    """Chooses for every site one of its levels so that the whole keeps to a budget and stays near to what it was.

    Near is a small KL from the model's answers to the candidate's on sample text.

    budget: what may be spent, such as {bits: 3.25}, {share: 0.2} or {blocks: 0.25}.
    weights: encodings among which each matrix takes one.
    depth: whether blocks, each attention and feed-forward part by itself, may be left out.
    cache: how a layer's cache may be stored, such as [{}, {keys: …, values: …}]; {} leaves it as it is.
    solver: integer codes are rounded to the nearest, in clipped ranges, or by GPTQ on the sample text.
    vocabulary: whether the head and lookup tables have a choice as well; else they stay as they are.
    by: additive, which sums what each site costs alone; evolution, which begins there; or exhaustive, for tiny spaces.
    generations, offspring: how long evolution goes on, and candidates of each generation.
    stages: texts that candidates are compared on, and how many survive; the last one selects the next parent.
    seed: of all that is drawn.
    processes: how many evaluate at once; with Ray, where it is installed, on the machines of $RAY_ADDRESS.

    Levels and evaluations are kept with the state of trainings: what was killed goes on where it was.

    Deviations: a mutation pays for raised levels by lowering others wherever the budget says so, and then spends what
    is left, where the paper trades within groups of equal size; so budgets of bytes over unlike sites are met as well.
    Attention may be traded for feed-forward parts. The texts of a stage are drawn anew in each generation unless the
    last stage takes all of them. Where the paper begins with even levels or random ones, the best sum of what sites
    lose alone stands beside them, and a level is left out that takes and loses more than another one of its site.
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    effects: ClassVar[frozenset[Effect]] = frozenset({"numerics", "encodings", "cache"})

    budget: Budget
    weights: tuple[Encoding, ...] = ()
    depth: bool = False
    cache: tuple[Stored, ...] = ()
    solver: Solver = "nearest"
    vocabulary: bool = False
    by: Literal["evolution", "additive", "exhaustive"] = "evolution"
    generations: int = 40
    offspring: int = 16
    stages: tuple[Stage, ...] = (Stage(2, 4), Stage(16, 1))
    seed: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        if not self.weights and not self.cache and not self.depth:
            raise SmeltError("nothing to choose among: give weights, cache or depth")
        if self.budget.bits is not None and not self.weights:
            raise SmeltError("a budget of bits is of weights, and these have no choice: give encodings as weights")
        if self.budget.blocks is not None and not self.depth:
            raise SmeltError("a budget of blocks leaves some out: say depth: true")
        if not self.stages or min(min(stage.texts, stage.survivors) for stage in self.stages) < 1:
            raise SmeltError("stages count texts and survivors from 1")
        if min(self.generations, self.offspring, self.processes) < 1:
            raise SmeltError("generations, offspring and processes count from 1")
        if calibrated := [e for s in self.cache for e in (s.keys, s.values) if e is not None and e.calibrated]:
            raise SmeltError(f"{calibrated[0]} has tables that come from data: a search takes cache encodings without")

    @property
    def calibration(self) -> Calibration:
        """Text, on which candidates are compared."""
        return "text"

    def requires(self, program: Program) -> Iterator[str]:
        """A decoder whose matrices are dense; with cache levels a plan whose sites can be stored so."""
        yield from decoder_only(program)
        found = choices(program, self.weights, self.vocabulary) if self.weights else {}
        yield from all_dense(program, [name for name, levels in found.items() if isinstance(levels, list)])
        if self.depth:
            yield from droppable(program, "search.spend")
        if self.cache or self.budget.ms is not None:
            yield from cached_decoder(program)
        for level in self.cache if program.cache is not None else ():
            if level != Stored():
                yield from Encode(level.keys, level.values).requires(program)
        if self.depth and program.cache is not None and (linked := _linked(program)) is not None:
            yield f"layer {linked} of the cache refers to another one, which may be left out: leave depth out"
        if self.budget.blocks is not None and (count := len(blocks(program))) <= self.budget.left_out(count):
            yield f"a budget of {self.budget.blocks:g} blocks leaves all {count} of them out: lower it"

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Make the levels, search, and put the best candidate in the program's place."""
        if samples is None:
            raise SmeltError("search.spend compares candidates on sample texts: pass calibration texts to compile")
        finished = Finished.of(program, self._solving, samples)
        space, skipped = self._space(program, samples, finished)
        purse = Purse(space, tuple(self._limits(space, samples)))
        purse.check()
        journal = Journal(self._log(program, finished), finished.asked)
        with workers(Judge(space, samples.tokens), self.processes) as crew:
            scores = Scores(space, journal, crew)
            best, curve = self._search(purse, scores, samples)
        if not math.isfinite(curve[-1]):
            raise SmeltError("no candidate gives finite outputs: give larger levels, or a larger budget")
        space.put(best, program)
        return Outcome(
            tuple(site.name for site in space.sites),
            skipped,
            {
                "kl": round(curve[-1], 6),
                "curve": [round(kl, 6) for kl in curve if math.isfinite(kl)],
                "evaluations": {"made": scores.made, "looked_up": scores.known},
                "spent": {each.what: round(each.spent(space, best), 4) for each in purse.resources},
                "levels": space.told(best),
            },
        )

    @property
    def _solving(self) -> Spend:
        """Options that decide what a level is, whatever else there is to choose among."""
        return Spend(Budget(bytes=1), depth=True, solver=self.solver)

    def _log(self, program: Program, finished: Finished) -> Path | None:
        """The file of evaluations: what there is to choose among decides them, and what the cache stores."""
        if finished.folder is None:
            return None
        plan = json.dumps(program.cache.to_dict(), default=str) if program.cache is not None else ""
        options = (self.weights, self.depth, self.cache, self.vocabulary, plan)
        return finished.folder / f"evaluations-{sha256(repr(options).encode()).hexdigest()[:16]}.jsonl"

    def _space(self, program: Program, samples: Samples, finished: Finished) -> tuple[Space, dict[str, str]]:
        """The sites with their levels made, and why weights have no choice."""
        found = choices(program, self.weights, self.vocabulary) if self.weights else {}
        asked = {name: levels for name, levels in found.items() if isinstance(levels, list)}
        weights = made(program, asked, self.solver, samples, finished)
        sites, names, layers = block_sites(program) if self.depth else ([], {}, {})
        sites += [
            Site("weight", name, name, tuple(str(each.encoding) for each in levels), names.get(name))
            for name, levels in weights.items()
        ]
        caches = {
            site.layer: sorted(((level.at(program, site.layer), str(level)) for level in self.cache), key=_bits)
            for site in (program.cache.sites if program.cache is not None and self.cache else ())
        }
        sites += [
            Site("cache", layer, f"cache of layer {layer}", tuple(told for _, told in levels), layers.get(layer))
            for layer, levels in caches.items()
        ]
        held = {layer: tuple(site for site, _ in levels) for layer, levels in caches.items()}
        space = Space(program, tuple(sites), weights, held, {"weight": names, "cache": layers})
        return space, {name: why for name, why in found.items() if isinstance(why, str)}

    def _limits(self, space: Space, samples: Samples) -> Iterator[Resource]:
        yield from resources(space, self.budget)
        if self.budget.ms is not None:
            if samples.clock is None:
                raise SmeltError("a budget of ms is measured by what compiles the model, which is not at hand here")
            yield milliseconds(space, self.budget.ms, self.budget.context, samples.clock, samples.progress)

    def _search(self, purse: Purse, scores: Scores, samples: Samples) -> tuple[Candidate, list[float]]:
        """The best candidate, and the KL of those before it."""
        count = len(samples.tokens)
        rows = range(min(self.stages[-1].texts, count))
        first = rows if self.by == "additive" else range(min(self.stages[0].texts, count))
        scores.tell = lambda done, total: samples.progress(done, total, "evaluating candidates")
        if self.by == "exhaustive":
            return exhaustive(purse, scores, rows)
        lost = alone(purse.space, scores, first)
        purse = replace(purse, outdone=outdone(purse, lost))
        if self.by == "additive":
            return (chosen := additive(purse, lost)), scores([chosen], rows)
        scores.tell = lambda done, total: None
        course = Course(self.generations, self.offspring, self.stages, self.seed, count)

        def tell(generation: int, kl: float) -> None:
            samples.progress(generation - 1, self.generations, f"generation {generation}, KL {kl:.4g}")

        return evolve(purse, lost, scores, course, tell)


def _bits(level: tuple[CacheSite, str]) -> int:
    return int(level[0].bits(WEIGHED))


def _linked(program: Program) -> int | None:
    """A layer whose cache site is read through another's."""
    assert program.cache is not None
    sites = (s for s in program.cache.sites if s.predict is not None or (s.retrieve and s.retrieve.by == "reuse"))
    return next((site.layer for site in sites), None)
