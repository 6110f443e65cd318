"""What the passes over cache sites share: trying a change of sites, and making it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from ...ir.cache import CachePlan, Site
from ...ir.errors import SmeltError

SINK, TAIL, PAGE = 4, 64, 64  # where neither the step nor the plan says otherwise


def faults(sites: Iterable[Site], change: Callable[[Site], Site]) -> Iterator[str]:
    """Why the changed sites would not be legal: the first fault, and how many layers share it."""
    found: list[str] = []
    for site in sites:
        try:
            change(site)
        except SmeltError as fault:
            found.append(str(fault))
    if found:
        yield found[0] + (f" (and so for {len(found) - 1} more layers)" if len(found) > 1 else "")


def changed(plan: CachePlan, sites: Iterable[Site], change: Callable[[Site], Site]) -> CachePlan:
    """The plan with these sites changed."""
    for site in sites:
        plan = plan.with_site(change(site))
    return plan
