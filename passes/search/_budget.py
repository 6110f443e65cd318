"""What a search may spend: what each site takes at each of its levels, and the moves that keep to a limit."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any

from ...ir.errors import SmeltError
from ._space import Candidate, Space

FLIPS = 3  # a mutation raises at most so many sites
TRIES = 50  # mutations that are thrown away before a parent counts as having no other


@dataclass(frozen=True)
class Budget:
    """Limits, all of which hold.

    bytes: of the weights, and of a cache of `context` tokens where there is one.
    share: of these bytes, as they are in front of the step.
    bits: stored bits per value of the weights that have a choice, scales included.
    blocks: how many are left out, exactly; below 1 a share of them.
    ms: milliseconds of a decode step behind `context` tokens, measured on this machine.
    context: tokens of one sequence.
    """

    bytes: int | None = None
    share: float | None = None
    bits: float | None = None
    blocks: float | None = None
    ms: float | None = None
    context: int = 1024

    def left_out(self, count: int) -> int:
        """How many of so many blocks leave."""
        assert self.blocks is not None
        return round(self.blocks * count) if self.blocks < 1 else int(self.blocks)

    def __post_init__(self) -> None:
        limits = {n: v for n, v in vars(self).items() if n != "context" and v is not None}
        if not limits:
            raise SmeltError("give a limit: bytes, share, bits, blocks or ms")
        if wrong := [f"{name} {limit}" for name, limit in (limits | {"context": self.context}).items() if limit <= 0]:
            raise SmeltError(f"limits are above 0, but there is {wrong[0]}")


@dataclass(frozen=True)
class Resource:
    """Something limited: what the sites take at each level while they are there, and what all the rest takes."""

    what: str
    limit: float
    fixed: float
    costs: Sequence[Sequence[float]]

    def spent(self, space: Space, candidate: Candidate) -> float:
        """What a candidate takes."""
        there = (i for i in range(len(candidate)) if space.alive(candidate, i))
        return self.fixed + math.fsum(self.costs[i][candidate[i]] for i in there)


def resources(space: Space, budget: Budget) -> Iterator[Resource]:
    """What a budget limits, in its own units."""
    program = space.program
    stored = program.cache.sites if program.cache is not None else ()
    rest: dict[tuple[str, Any], int] = {("weight", name): weight.nbytes for name, weight in program.weights.items()}
    rest |= {("cache", site.layer): int(site.bits(budget.context)) // 8 for site in stored}
    now = sum(rest.values())
    costs: list[list[float]] = []
    for site in space.sites:
        if site.kind == "weight":
            costs.append([weight.nbytes for weight in space.weights[site.at]])
        elif site.kind == "cache":
            costs.append([int(level.bits(budget.context)) // 8 for level in space.caches[site.at]])
        else:
            costs.append([0, 0])
        rest.pop((site.kind, site.at), None)
    for (kind, at), size in list(rest.items()):
        if (block := space.leaves[kind].get(at)) is not None:
            costs[block][1] += size
            rest.pop((kind, at))
    if budget.bytes is not None:
        yield Resource("bytes", budget.bytes, sum(rest.values()), costs)
    if budget.share is not None:
        shares = [[cost / now for cost in each] for each in costs]
        yield Resource("of the bytes", budget.share, sum(rest.values()) / now, shares)
    pairs = list(zip(space.sites, costs, strict=True))
    if budget.bits is not None:
        values = sum(math.prod(program.weights[site.at].shape) for site in space.sites if site.kind == "weight")
        bits = [[8 * cost / values if site.kind == "weight" else 0.0 for cost in each] for site, each in pairs]
        yield Resource("bits a weight", budget.bits, 0.0, bits)
    if budget.blocks is not None:
        count = sum(site.kind == "block" for site in space.sites)
        kept = [[float(site.kind == "block" and level) for level in range(len(each))] for site, each in pairs]
        yield Resource("blocks kept", count - budget.left_out(count), 0.0, kept)


@dataclass(frozen=True)
class Purse:
    """A space under its limits. Moves step over `outdone` levels, given as (site, level)."""

    space: Space
    resources: tuple[Resource, ...]
    outdone: frozenset[tuple[int, int]] = frozenset()

    def fits(self, candidate: Candidate) -> bool:
        """Whether a candidate keeps to every limit and has some attention."""
        kept = all(r.spent(self.space, candidate) <= r.limit * (1 + 1e-12) for r in self.resources)
        return kept and self.space.attends(candidate)

    def check(self) -> None:
        """Raises SmeltError, with the nearest that can be met, for a budget that is below every candidate."""
        least = self._least()
        for r in self.resources:
            if (nearest := r.spent(self.space, least)) > r.limit:
                raise SmeltError(
                    f"a budget of {r.limit:.10g} {r.what} cannot be met: the least that these levels allow is "
                    f"{math.ceil(nearest * 1e4) / 1e4:.10g}; ask for that, or give smaller levels"
                )

    def even(self) -> Candidate:
        """All sites at about the same level, the highest that fits, then filled; blocks leave last, at random."""
        steps = max(map(len, self.levels))
        for step in reversed(range(steps)):
            tried = tuple(
                1 if site.kind == "block" else levels[step * (len(levels) - 1) // max(1, steps - 1)]
                for site, levels in zip(self.space.sites, self.levels, strict=True)
            )
            if self.fits(tried):
                return self.filled(tried, Random(0))
        shrunk = self._shrunk(tried, Random(0), ())
        return self.filled(self._least() if shrunk is None else shrunk, Random(0))

    def chance(self, random: Random) -> Candidate:
        """A candidate that was filled up at random from the least one."""
        return self.filled(self._least(), random)

    def filled(self, candidate: Candidate, random: Random) -> Candidate:
        """Sites raised by one level at a time, in random order, until none fits any more: nothing is left to spend."""
        open_ = self.movable(candidate, 1)
        while open_:
            site = random.choice(open_)
            if self.fits(raised := self.moved(candidate, site, 1)):
                candidate, open_ = raised, self.movable(raised, 1)
            else:
                open_.remove(site)
        return candidate

    def spends(self, candidate: Candidate) -> bool:
        """Whether nothing more fits: what is left of the budget raises no site."""
        return not any(self.fits(self.moved(candidate, site, 1)) for site in self.movable(candidate, 1))

    def switched(self, parent: Candidate, random: Random) -> Candidate | None:
        """Some sites raised by one level and others lowered until that is paid for; None if nothing else was found.

        They are of one kind or two: were blocks among all that may be lowered, hardly a mutation would spare them.
        """
        for _ in range(TRIES):
            kinds = {random.choice(self.space.sites).kind for _ in range(2)}
            stay = {i for i, site in enumerate(self.space.sites) if site.kind not in kinds}
            child, up = parent, set[int]()
            for _ in range(min(random.randint(1, FLIPS), random.randint(1, FLIPS))):
                if open_ := [site for site in self.movable(child, 1) if site not in stay]:
                    up.add(site := random.choice(open_))
                    child = self.moved(child, site, 1)
            lowered = self._shrunk(child, random, up | stay)
            if lowered is None:
                continue
            child = self.filled(lowered, random)
            if self.space.key(child) != self.space.key(parent):
                return child
        return None

    def _shrunk(self, candidate: Candidate, random: Random, stay: Collection[int]) -> Candidate | None:
        """Sites lowered at random until the rest fits; None if those outside `stay` do not suffice."""
        while not self.fits(candidate):
            open_ = [site for site in self.movable(candidate, -1) if site not in stay]
            open_ = [site for site in open_ if self.space.attends(self.moved(candidate, site, -1))]
            if not open_:
                return None
            candidate = self.moved(candidate, random.choice(open_), -1)
        return candidate

    def movable(self, candidate: Candidate, by: int) -> list[int]:
        """Sites that are there and have a level in this direction."""
        there = (i for i in range(len(candidate)) if self.space.alive(candidate, i))
        return [i for i in there if candidate[i] != self.levels[i][-1 if by > 0 else 0]]

    def moved(self, candidate: Candidate, site: int, by: int) -> Candidate:
        """The candidate with one site at its next level, for `by` = 1 the one above and for -1 the one below."""
        levels = self.levels[site]
        return (*candidate[:site], levels[levels.index(candidate[site]) + by], *candidate[site + 1 :])

    @cached_property
    def levels(self) -> list[list[int]]:
        """Of each site those that are stepped through, from small to large."""
        sites = enumerate(self.space.sites)
        return [[level for level in range(len(s.levels)) if (i, level) not in self.outdone] for i, s in sites]

    def _least(self) -> Candidate:
        """Everything at its lowest level but for the attention that takes least."""
        nothing = tuple(levels[0] for levels in self.levels)
        if self.space.attends(nothing):
            return nothing
        raised = [self.moved(nothing, i, 1) for i, site in enumerate(self.space.sites) if site.kind == "block"]
        attending = [candidate for candidate in raised if self.space.attends(candidate)]
        return min(attending, key=lambda candidate: self.resources[0].spent(self.space, candidate))
