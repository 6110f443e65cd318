"""What a decode step takes at each level of each site, measured on whole programs of which one kind of site changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..base import Clock
from ._budget import Resource
from ._space import Candidate, Space


def milliseconds(
    space: Space, limit: float, context: int, clock: Clock, tell: Callable[[int, int, str], None]
) -> Resource:
    """The limit of a step behind `context` tokens. Sites that are alike change together, and share the difference."""
    base = tuple(int(site.kind == "block") for site in space.sites)
    groups: dict[Any, list[int]] = {}
    for number, site in enumerate(space.sites):
        shape = space.program.weights[site.at].shape if site.kind == "weight" else None
        groups.setdefault((site.kind, site.levels, shape), []).append(number)
    asked: list[tuple[list[int], list[int], int]] = []
    for alike in groups.values():
        changed = alike if space.attends(_at(base, alike, 0)) else alike[1:]  # some attention stays in every program
        levels = range(len(space.sites[alike[0]].levels))
        asked += [(alike, changed, level) for level in levels if level != base[alike[0]] and changed]
    whole, costs = clock(space.build(base), context), [[0.0] * len(site.levels) for site in space.sites]
    for at, (alike, changed, level) in enumerate(asked):
        tell(at, len(asked), "timing steps")
        more = (clock(space.build(_at(base, changed, level)), context) - whole) / len(changed)
        for number in alike:
            if space.sites[number].kind == "block":
                costs[number][1] = -more  # a block that is left out costs nothing
            else:
                costs[number][level] = more
    kept = sum(cost[1] for cost, site in zip(costs, space.sites, strict=True) if site.kind == "block")
    return Resource("milliseconds a step", limit, whole - kept, costs)


def _at(candidate: Candidate, sites: Sequence[int], level: int) -> Candidate:
    return tuple(level if number in sites else held for number, held in enumerate(candidate))
