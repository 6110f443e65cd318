"""Levels by the sum of what each costs alone: no order of one site depends on another, which is fast and often wrong.

Under one limit the best sum is found by Lagrange's multiplier (Shoham and Gersho, 1988), up to the gaps of its hull.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

from ...ir.errors import SmeltError
from ._budget import Purse
from ._scores import Scores
from ._space import Candidate, Space

HALVINGS = 60
Lost: TypeAlias = Sequence[Sequence[float]]  # in nats, by site and level, more than with that site at its largest


def alone(space: Space, scores: Scores, rows: Sequence[int]) -> Lost:
    """What the largest candidate loses with one site lowered."""
    top = tuple(len(site.levels) - 1 for site in space.sites)
    lowered = [[(*top[:i], level, *top[i + 1 :]) for level in range(top[i] + 1)] for i in range(len(top))]
    found = iter(scores([candidate for each in lowered for candidate in each], rows))
    kl = [[next(found) for _ in each] for each in lowered]
    if not math.isfinite(kl[0][-1]):
        raise SmeltError("the largest candidate gives outputs that are not finite: give larger levels")
    return [[each - whole for each in (*less, whole)] for *less, whole in kl]


def outdone(purse: Purse, lost: Lost) -> frozenset[tuple[int, int]]:
    """Levels, as (site, level), of which another takes no more of any limit and loses less."""

    def beats(site: int, other: int, level: int) -> bool:
        less = all(each.costs[site][other] <= each.costs[site][level] for each in purse.resources)
        return less and (lost[site][other], -other) < (lost[site][level], -level)

    return frozenset(
        (i, level)
        for i, site in enumerate(purse.space.sites)
        if site.kind != "block"  # whose costs are those of what leaves with them
        for level in range(len(site.levels))
        if any(beats(i, other, level) for other in range(len(site.levels)))
    )


def total(space: Space, candidate: Candidate, lost: Lost) -> float:
    """The sum of what the sites that are there lose alone."""
    return math.fsum(lost[i][level] for i, level in enumerate(candidate) if space.alive(candidate, i))


def additive(purse: Purse, lost: Lost) -> Candidate:
    """The candidate that fits and loses least by the sum of what its sites lose alone."""
    space = purse.space

    def loss(i: int, level: int, weight: float) -> float:
        """What a level loses, and what it takes of the limits for so much each."""
        return lost[i][level] + weight * sum(each.costs[i][level] / each.limit for each in purse.resources)

    def best(weight: float) -> Candidate:
        levels = [min(each, key=lambda level: loss(i, level, weight)) for i, each in enumerate(purse.levels)]
        for i, site in enumerate(space.sites):
            if site.kind == "block":
                inside = [j for j, other in enumerate(space.sites) if other.inside == i]
                kept = loss(i, 1, weight) + sum(loss(j, levels[j], weight) for j in inside)
                levels[i] = int(kept <= loss(i, 0, weight))
        return tuple(levels)

    low, high = 0.0, 1.0
    while not purse.fits(best(high)) and high < 1e30:
        high *= 4
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if purse.fits(best(middle)) else (middle, high)
    chosen = best(high) if purse.fits(best(high)) else purse.even()
    while True:
        raised = {i: purse.moved(chosen, i, 1) for i in purse.movable(chosen, 1)}
        gain = {i: lost[i][chosen[i]] - lost[i][more[i]] for i, more in raised.items() if purse.fits(more)}
        if not gain:
            return chosen
        chosen = raised[max(gain, key=gain.__getitem__)]
