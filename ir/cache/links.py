"""What layers of a cache owe to earlier ones: forecasts that they correct, and lists that they read again."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..errors import SmeltError
from .plan import CachePlan, Site
from .predict import Forecast
from .schedule import Schedule
from .segments import Segments


def foresee(plan: CachePlan, segments: Mapping[int, Segments], device: torch.device) -> None:
    """Let layers that store what a forecast misses know the layer before."""
    before = None
    for site in plan.sites:
        bodies = segments[site.layer].bodies
        if site.predict is not None and not site.predict.first:
            if before is None:
                raise SmeltError(
                    f"layer {site.layer} stores what a forecast misses, but no encoded layer is before it: run "
                    "cache.predict again"
                )
            maps = {name: table.to(device) for name, table in plan.tables_of(site.layer, 0)["predict"].items()}
            bodies[0].forecast = Forecast(before, maps)
        before = bodies[0] if bodies else None


def check_lists(plan: CachePlan, schedules: Mapping[int, Schedule]) -> None:
    """Raises SmeltError for a list that is not made in front of the layer that reads it, of a body of the same tokens.

    `schedules`: by layer; layers that store the same tokens share one.
    """
    makers: dict[int | None, Site] = {}
    for site in plan.sites:
        if site.retrieve is not None and site.retrieve.by == "reuse":
            maker = makers.get(site.retrieve.source)
            same = maker is not None and (maker.kv_heads, maker.window) == (site.kv_heads, site.window)
            if maker is None or not same or schedules[maker.layer] is not schedules[site.layer]:
                raise SmeltError(
                    f"layer {site.layer} reads the list of layer {site.retrieve.source}, which must be one in "
                    "front that scans, with the same KV heads, window, sink, tail and page: put cache.retrieve "
                    "last, or name another layer"
                )
        elif site.retrieve is not None and site.retrieve.by != "pages":
            makers[site.layer] = site
