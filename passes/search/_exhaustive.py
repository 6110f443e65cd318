"""Every candidate that leaves nothing of the budget: the oracle for tiny spaces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

from ...ir.errors import SmeltError
from ._budget import Purse
from ._scores import Scores
from ._space import Candidate

MOST = 1 << 16  # candidates that are listed


def exhaustive(purse: Purse, scores: Scores, rows: Sequence[int]) -> tuple[Candidate, list[float]]:
    """The best candidate of all, and its KL. Raises SmeltError for a space that is too large."""
    sizes = [range(len(site.levels)) for site in purse.space.sites]
    if (count := math.prod(map(len, sizes))) > MOST:
        raise SmeltError(f"by: exhaustive lists {count:.3g} candidates, more than {MOST}: search by evolution")
    fitting = {purse.space.key(c): c for c in product(*sizes) if purse.fits(c) and purse.spends(c)}
    candidates = list(fitting.values())
    found = scores(candidates, rows)
    best = min(range(len(found)), key=found.__getitem__)
    return candidates[best], [found[best]]
