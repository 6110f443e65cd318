"""Estimates attention from samples of keys and values (SubGen: Token Generation in Sublinear Time and Memory, 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from ...ir import cache
from ...ir.program import Program
from .._contracts import cached_decoder
from ..base import Effect, Exactness, Outcome, Pass, Samples
from ._sites import PAGE, SINK, TAIL, changed, faults


@dataclass(frozen=True)
class Estimate(Pass):
    """Of the tokens that leave the tail each KV head holds samples, and estimates what it would read of all of them.

    values: tokens drawn by the square of their values' norms, for the sum of values.
    clusters: most clusters of keys, for the sum of weights; each has its first key,
    samples: and so many others, drawn uniformly.
    radius: greatest distance of a key to the first one of its cluster, as a share of that one's norm.
    mix: part of the sum of weights that is estimated from the tokens drawn by values, a power of two below 1.
    seed: of the draws, which otherwise go by positions alone.
    sink: first tokens of a sequence, which always stay.
    tail: newest tokens, which stay until they are older.
    page: tokens that leave together.
    skip_layers: layers that keep every token.

    Deviations: draws are without replacement (priority sampling, 2007), exact while everything fits; a cluster's first
    key stands for itself alone; the radius is relative and the number of clusters bounded, and beyond it keys join the
    nearest one. An entry's value cannot count without its weight, so that a part `mix` of the sum of weights comes from
    the tokens for values, which has no bias either; the smaller it is, the nearer to the paper, and the noisier.
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    effects: ClassVar[frozenset[Effect]] = frozenset({"numerics", "cache"})

    values: int = 128
    clusters: int = 64
    samples: int = 1
    radius: float = 0.5
    mix: float = 0.5
    seed: int = 0
    sink: int = SINK
    tail: int = TAIL
    page: int = PAGE
    skip_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self._made()  # refuses what no site could follow

    def requires(self, program: Program) -> Iterator[str]:
        """A cache plan whose sites hold tokens as they are."""
        yield from cached_decoder(program)
        if program.cache is None:
            return
        layers = [site.layer for site in program.cache.sites]
        if unknown := sorted(set(self.skip_layers) - set(layers)):
            yield f"skip_layers names layer {unknown[0]}, but the cache has the layers {layers[0]} to {layers[-1]}"
        sites = self._sites(program.cache)
        if not sites:
            yield f"skip_layers leaves none of the layers {layers[0]} to {layers[-1]} to estimate"
        if any(site.estimate is not None for site in sites):
            yield f"layer {sites[0].layer} is already estimated{program.changed_by('cache')}: keep one of the two steps"
            return
        yield from faults(sites, self._estimated)

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Set the estimate of every site that is not skipped."""
        assert program.cache is not None
        sites = self._sites(program.cache)
        skipped = {f"layer {site.layer}": "named in skip_layers" for site in program.cache.sites if site not in sites}
        program.cache = changed(program.cache, sites, self._estimated)
        program.touch("cache")
        return Outcome(tuple(f"layer {site.layer}" for site in sites), skipped)

    def _sites(self, plan: cache.CachePlan) -> list[cache.Site]:
        return [site for site in plan.sites if site.layer not in self.skip_layers]

    def _estimated(self, site: cache.Site) -> cache.Site:
        return replace(site, estimate=self._made(), sink=self.sink, tail=self.tail, page=self.page)

    def _made(self) -> cache.Estimate:
        return cache.Estimate(self.values, self.clusters, self.samples, self.radius, self.mix, self.seed)
