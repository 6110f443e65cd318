"""Chooses the frame in which keys are stored, and whose positions they have (KVQuant, 2024; StreamingLLM, 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from ...ir.cache import Site
from ...ir.errors import SmeltError
from ...ir.program import Program
from .._contracts import cached_decoder
from ..base import Effect, Exactness, Outcome, Pass, Samples
from ._sites import changed, faults


@dataclass(frozen=True)
class Transform(Pass):
    """Stores the keys that leave the tail as they were before their rotation, and may move them to other positions.

    frame: pre un-rotates keys before they are encoded, and turns them by their position when they are read; post keeps
        them as attention reads them.
    compact: positions are those within the cache: what is stored stands right in front of the tail, without gaps.

    A rotation is orthogonal, so that frame: pre alone changes nothing but rounding. Models without rotary positions
    have one frame, and are refused.
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    effects: ClassVar[frozenset[Effect]] = frozenset({"numerics", "cache"})

    frame: Literal["pre", "post"] = "pre"
    compact: bool = False

    def __post_init__(self) -> None:
        if self.frame == "post" and self.compact:
            raise SmeltError("compact moves keys to other positions, which needs frame: pre")

    def requires(self, program: Program) -> Iterator[str]:
        """A cache plan of one frame so far, with rotated keys."""
        yield from cached_decoder(program)
        if program.cache is None:
            return
        for site in program.cache.sites:
            if site.rope is None:
                yield (
                    f"keys of layer {site.layer} must be rotated by their positions, but are not: positions of this "
                    "model are learned or built in another way, so that its keys have one frame"
                )
                return
            if site.frame == "pre":
                yield (
                    f"layer {site.layer} already stores keys un-rotated{program.changed_by('cache')}: put both into "
                    "one cache.transform"
                )
                return
            if site.keys is not None or any(tier.keys is not None for tier in site.tiers):
                yield (
                    f"the frame must be chosen before keys of layer {site.layer} are encoded"
                    f"{program.changed_by('cache')}: move cache.transform in front"
                )
                return
        yield from faults(program.cache.sites, self._framed)

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Set the frame of every site."""
        assert program.cache is not None
        sites = program.cache.sites
        program.cache = changed(program.cache, sites, self._framed)
        program.touch("cache")
        return Outcome(tuple(f"layer {site.layer}" for site in sites))

    def _framed(self, site: Site) -> Site:
        return replace(site, frame=self.frame, compact=self.compact)
