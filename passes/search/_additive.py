"""Levels by the sum of what each costs alone: no order of one site depends on another, which is fast and often wrong.

Under one limit the best sum is found by Lagrange's multiplier (Shoham and Gersho, 1988), up to the gaps of its hull.
"""

from __future__ import annotations

from collections.abc import Sequence

from ._budget import Purse, moved
from ._scores import Scores
from ._space import Candidate

HALVINGS = 60


def additive(purse: Purse, scores: Scores, rows: Sequence[int]) -> tuple[Candidate, list[float]]:
    """The candidate whose sites cost least KL, each lowered alone in the largest candidate, and its own KL."""
    space = purse.space
    top = tuple(len(site.levels) - 1 for site in space.sites)
    alone = [[(*top[:i], level, *top[i + 1 :]) for level in range(top[i] + 1)] for i in range(len(top))]
    found = scores([candidate for each in alone for candidate in each], rows)
    lost = [found[sum(map(len, alone[:i])) :][: len(each)] for i, each in enumerate(alone)]

    def loss(i: int, level: int, weight: float) -> float:
        """What a level loses, and what it takes of the limits for so much each."""
        return lost[i][level] + weight * sum(each.costs[i][level] / each.limit for each in purse.resources)

    def best(weight: float) -> Candidate:
        levels = [min(range(most + 1), key=lambda level: loss(i, level, weight)) for i, most in enumerate(top)]
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
        raised = [i for i in range(len(top)) if chosen[i] < top[i] and space.alive(chosen, i)]
        raised = [i for i in raised if purse.fits(moved(chosen, i, 1))]
        if not raised:
            return chosen, scores([chosen], rows)
        gain = {i: (lost[i][chosen[i]] - lost[i][chosen[i] + 1], -i) for i in raised}
        chosen = moved(chosen, max(raised, key=gain.__getitem__), 1)
