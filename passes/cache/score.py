"""Says what makes a token worth keeping in the cache (H2O, SnapKV, ZipCache, Finch, EMS: attention received)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from ...ir import cache
from ...ir.program import Program
from .._contracts import cached_decoder
from ..base import Effect, Exactness, Outcome, Pass, Samples
from ._sites import changed


@dataclass(frozen=True)
class Score(Pass):
    """A score per token and KV head, for the cache.select behind it; higher is more worth keeping.

    by: attention (what keys receive), key_norm (low L2 norms), key_diff (unlike the mean key), value_norm, recency,
        stride, random or centers (keys far from each other, found greedily).
    queries: newest queries whose attention counts (below 1: that share of the prompt; null: all).
    probes: share of older queries that are asked as well, drawn by their positions.
    normalize: none, count (by the queries that see a key) or length (rows weigh as the keys that they see).
    pool: odd width of a moving average over tokens.
    reduce: how the query heads of a KV head are joined.
    combine: aligned takes the larger of the newest `local` queries' mass and all queries' scaled to the same mean.
    local: see combine.
    stride: every how many tokens one is kept, for by: stride.
    seed: of what is random.
    """

    exactness: ClassVar[Exactness] = Exactness.EXACT
    effects: ClassVar[frozenset[Effect]] = frozenset({"cache"})

    by: Literal["attention", "key_norm", "key_diff", "value_norm", "recency", "stride", "random", "centers"] = (
        "attention"
    )
    queries: float | None = None
    probes: float = 0.0
    normalize: Literal["none", "count", "length"] = "none"
    pool: int = 1
    reduce: Literal["mean", "max", "sum"] = "mean"
    combine: Literal["none", "aligned"] = "none"
    local: int = 32
    stride: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        self.made()  # refuses what no score could follow

    def made(self) -> cache.Score:
        """The score as sites hold it."""
        return cache.Score(**{name: getattr(self, name) for name in cache.Score.__dataclass_fields__})

    def requires(self, program: Program) -> Iterator[str]:
        """A cache plan whose sites have no score and are not selected from yet."""
        yield from cached_decoder(program)
        if program.cache is None:
            return
        for site in program.cache.sites:
            if site.select is not None:
                yield (
                    f"layer {site.layer} already selects by {site.select.score.by}{program.changed_by('cache')}: "
                    "put cache.score in front of cache.select"
                )
                return
            if site.score is not None:
                yield (
                    f"layer {site.layer} already has a score by {site.score.by}{program.changed_by('cache')}: keep one "
                    "of the two steps"
                )
                return

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Note the score at every site."""
        assert program.cache is not None
        sites = program.cache.sites
        program.cache = changed(program.cache, sites, lambda site: replace(site, score=self.made()))
        program.touch("cache")
        return Outcome(tuple(f"layer {site.layer}" for site in sites))
