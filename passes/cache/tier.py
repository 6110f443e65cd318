"""Parts the stored tokens into tiers of different precision, by score (ZipCache, 2024) or by age (SAQ's staircase)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from ...ir import cache
from ...ir.errors import SmeltError
from ...ir.program import Program
from .._contracts import cached_decoder
from ..base import Calibration, Effect, Exactness, Outcome, Pass, Samples
from ._calibrate import tables, written
from ._sites import changed, faults


@dataclass(frozen=True)
class Tier(Pass):
    """Adds bodies below the one that cache.encode described.

    tiers: what each holds, from the best or newest on: its encodings of keys and values, and either the `share` of
        surviving tokens that it gets by score, or (without one) what the tier above lets go, up to `budget` tokens.
    hold: tokens of the first body, where tiers go by age.
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    effects: ClassVar[frozenset[Effect]] = frozenset({"numerics", "encodings", "cache"})

    tiers: tuple[cache.Tier, ...] = ()
    hold: int | None = None

    def __post_init__(self) -> None:
        if not self.tiers:
            raise SmeltError("give at least one tier, such as {share: 0.4, keys: …, values: …}")

    @property
    def calibration(self) -> Calibration:
        """Text where an encoding has tables that come from data."""
        held = (encoding for tier in self.tiers for encoding in (tier.keys, tier.values))
        return "text" if any(encoding is not None and encoding.calibrated for encoding in held) else "none"

    def requires(self, program: Program) -> Iterator[str]:
        """Sites with pages and without tiers; tiers by score need a selection."""
        yield from cached_decoder(program)
        if program.cache is None:
            return
        for site in program.cache.sites:
            if site.tail is None:
                yield f"tokens of layer {site.layer} must leave the tail, but all stay: put cache.encode in front"
                return
            if site.tiers:
                yield f"layer {site.layer} already has tiers{program.changed_by('cache')}: put all into one cache.tier"
                return
        yield from faults(program.cache.sites, self._tiered)

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Add the tiers to every site that keeps anything."""
        assert program.cache is not None
        sites = [site for site in program.cache.sites if site.kept]
        skipped = {f"layer {s.layer}": "nothing outlives its tail" for s in program.cache.sites if not s.kept}
        program.cache = changed(program.cache, sites, self._tiered)
        if self.calibration == "text":
            assert samples is not None
            kept, data = [program.cache[site.layer] for site in sites], written(program, samples)
            for number in range(1, 1 + len(self.tiers)):
                program.cache = program.cache.with_tables(tables(kept, data, number))
        program.touch("cache")
        return Outcome(tuple(f"layer {site.layer}" for site in sites), skipped)

    def _tiered(self, site: cache.Site) -> cache.Site:
        return replace(site, tiers=self.tiers, hold=self.hold)
