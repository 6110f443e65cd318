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

    share: fraction of the dropped tokens that are merged at most, best first; the others are gone.
    cover: each head merges only as many as it takes to hold this share of its score together with what is kept, so
        that a sparse head evicts what a spread one merges (null: all heads merge `share`).
    threshold: cosine below which a token joins the zero class and is gone as well.
    values_only: survivors keep their keys, and only values are averaged.

    Each survivor of n tokens gets ln n on its logit, which makes n equal keys exact. Deviation: the paper merges at
    every overflow while decoding as well; here a prompt is merged once.
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    effects: ClassVar[frozenset[Effect]] = frozenset({"numerics", "cache"})

    share: float = 0.5
    threshold: float = 0.0
    values_only: bool = False
    cover: float | None = None

    def __post_init__(self) -> None:
        self._made()

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
        return replace(site, merge=self._made())

    def _made(self) -> cache.Merge:
        return cache.Merge(self.share, self.threshold, self.values_only, self.cover)
