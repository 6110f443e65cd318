"""Merges tokens that a selection leaves out into their nearest survivors (EMS: Evict-then-Merge, 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from ...ir import cache
from ...ir.program import Program
from .._contracts import cached_decoder
from ..base import Effect, Exactness, Outcome, Pass, Samples
from ._sites import changed, faults


@dataclass(frozen=True)
class Merge(Pass):
    """The best of the tokens that a prompt's selection drops join the survivor of the largest cosine.

    share: fraction of the dropped tokens that are merged, best first; the others are gone.
    threshold: cosine below which a token joins the zero class and is gone as well.
    values_only: survivors keep their keys, and only values are averaged.

    Each survivor of n tokens gets ln n on its logit, which makes n equal keys exact. Deviation: the paper merges at
    every overflow while decoding as well, and sizes tiers by head; here a prompt is merged once, alike in all heads.
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    effects: ClassVar[frozenset[Effect]] = frozenset({"numerics", "cache"})

    share: float = 0.5
    threshold: float = 0.0
    values_only: bool = False

    def __post_init__(self) -> None:
        cache.Merge(self.share, self.threshold, self.values_only)

    def requires(self, program: Program) -> Iterator[str]:
        """A selection over the prompt, by a score that can weigh; keys that can be averaged; pages not encoded yet."""
        yield from cached_decoder(program)
        if program.cache is None:
            return
        sites = [site for site in program.cache.sites if site.select is not None]
        if not sites:
            yield f"{program.name} must select tokens of its prompts, but keeps all: put cache.select in front"
            return
        for site in sites:
            since = program.changed_by("cache")
            if site.merge is not None:
                yield f"layer {site.layer} already merges{since}: keep one of the two steps"
                return
            if site.select is not None and site.select.score.by not in ("attention", "value_norm"):
                yield (
                    f"layer {site.layer} selects by {site.select.score.by}, which is no weight for a mean: put "
                    "cache.score with by: attention or value_norm in front"
                )
                return
            if site.keys is not None or site.values is not None:
                yield f"merging must come before layer {site.layer} is encoded{since}: move cache.merge in front"
                return
        yield from faults(sites, self._merged)

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Set the merging of every site that selects."""
        assert program.cache is not None
        sites = [site for site in program.cache.sites if site.select is not None]
        skipped = {f"layer {s.layer}": "keeps every token" for s in program.cache.sites if s not in sites}
        program.cache = changed(program.cache, sites, self._merged)
        program.touch("cache")
        return Outcome(tuple(f"layer {site.layer}" for site in sites), skipped)

    def _merged(self, site: cache.Site) -> cache.Site:
        return replace(site, merge=cache.Merge(self.share, self.threshold, self.values_only))
