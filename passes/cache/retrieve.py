"""Reads only a part of the cache at a step (Quest, TokenSelect and TidalDecode, 2024); nothing is deleted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

from ...ir import cache
from ...ir.errors import SmeltError
from ...ir.program import Program
from .._contracts import cached_decoder, within_context
from ..base import Calibration, Effect, Exactness, Outcome, Pass, Samples
from ._lists import lost
from ._sites import SINK, TAIL, changed, faults


@dataclass(frozen=True)
class Retrieve(Pass):
    """Every query reads the sinks, the tail, and the `budget` tokens of the body that matter most to it.

    by: pages bounds the logits of a page by the extremes of its channels and reads the best pages, for each KV head
        (Quest). scan takes all logits, lets the heads vote by their softmax, and reads the best tokens (TokenSelect).
        reuse does so in `layers` only, which read everything; those behind them read the same tokens (TidalDecode).
    budget: tokens of the body that are read.
    dense_layers: first layers that read everything.
    layers: the layers that select, for by: reuse; where windows differ, some of each kind. A last one that is auto is
        the layer behind the others with which all layers lose least attention, in the mean over sample texts.
    sink: first tokens of a sequence, which are always read.
    tail: newest tokens, which are always read.
    page: tokens of a page.

    sink, tail and page are those of the plan where tokens leave the tail already.

    Lists are made of closed pages, for every token of a step alone, so that a tree of drafts reads what plain decoding
    would read; what a layer's window hides takes nothing of the budget. Deviations: TokenSelect scores a chunk of the
    prompt by its mean query and gives keys positions by their place in the list; here prompts are read whole, and every
    key keeps its own position. TidalDecode's code selects for each query head; here a layer's heads vote.
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    effects: ClassVar[frozenset[Effect]] = frozenset({"numerics", "cache"})

    by: Literal["pages", "scan", "reuse"] = "pages"
    budget: int = 1024
    dense_layers: int = 2
    layers: tuple[int | Literal["auto"], ...] = ()
    sink: int = SINK
    tail: int = TAIL
    page: int = 16

    def __post_init__(self) -> None:
        cache.Retrieve("pages", self.budget)
        if (self.by == "reuse") != bool(self.layers):
            raise SmeltError("by: reuse and layers, the ones that select, come together")
        named = self._named
        if self.layers and (not named or self.layers[: len(named)] != named or len(self.layers) > len(named) + 1):
            raise SmeltError(f"layers may end in one auto, behind layers that are named, but are {list(self.layers)}")
        if named and (tuple(sorted(set(named))) != named or named[0] < self.dense_layers):
            raise SmeltError(f"layers must ascend from dense_layers ({self.dense_layers}) on, not {list(self.layers)}")

    @property
    def calibration(self) -> Calibration:
        """Text where a layer is to be found."""
        return "text" if "auto" in self.layers else "none"

    @property
    def _named(self) -> tuple[int, ...]:
        return tuple(layer for layer in self.layers if layer != "auto")

    def requires(self, program: Program) -> Iterator[str]:
        """A cache plan that reads everything so far, with the layers that are named."""
        yield from cached_decoder(program)
        if program.cache is None:
            return
        yield from within_context(program, self.budget)
        sites = program.cache.sites
        for site in sites:
            if site.retrieve is not None:
                since = program.changed_by("cache")
                yield f"layer {site.layer} already reads a part of its cache{since}: keep one of the two steps"
                return
        last = sites[-1].layer
        named = self._named
        if named and named[-1] > last:
            yield f"layers names layer {named[-1]}, but the cache has the layers {sites[0].layer} to {last}"
            return
        if self.calibration == "text" and named[-1] == last:
            yield f"layers: auto is a layer behind layer {last}, and the cache has none: leave it out"
            return
        if self.dense_layers > last:
            yield f"dense_layers {self.dense_layers} leaves no layer that reads less: the cache has {len(sites)} layers"
            return
        for site in self._sites(program.cache) if named else ():
            if site.layer not in named and _source(program.cache, site, named) is None:
                yield (
                    f"layer {site.layer} sees {_seen(site)}, and no layer in front of it that selects does: name one "
                    f"in layers, beside {', '.join(map(str, named))}"
                )
                return
        yield from faults(self._sites(program.cache), partial(self._reading, program.cache, named))

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Set what every layer behind the dense ones reads."""
        assert program.cache is not None
        sites = self._sites(program.cache)
        skipped = {f"layer {s.layer}": "reads everything: dense_layers" for s in program.cache.sites if s not in sites}
        program.cache = changed(program.cache, program.cache.sites, self._paged)
        layers, notes = self._named, {}
        if self.calibration == "text":
            assert samples is not None
            found = self._found(program, samples)
            best = min(found, key=lambda layer: found[layer])
            layers = (*layers, best)
            notes = {"attention lost if it selects": {f"layer {layer}": round(x, 4) for layer, x in found.items()}}
        reading = partial(self._reading, program.cache, layers)
        program.cache = changed(program.cache, self._sites(program.cache), reading)
        program.touch("cache")
        return Outcome(tuple(f"layer {site.layer}" for site in sites), skipped, notes)

    def _found(self, program: Program, samples: Samples) -> dict[int, float]:
        """By layer behind the named ones, the mean over all sites of what they lose if it selects as well."""
        assert program.cache is not None
        plan, sites = program.cache, self._sites(program.cache)
        choosing = [replace(site, retrieve=cache.Retrieve("dense", self.budget)) for site in sites]
        shares = lost(program, choosing, samples)
        found = {}
        for site in sites:
            if site.layer > self._named[-1]:
                layers = (*self._named, site.layer)
                readers = [(_source(plan, reader, layers), reader.layer) for reader in sites]
                wanting = [shares.get((s, at), 1.0) for s, at in readers if s is not None and at not in layers]
                found[site.layer] = sum(wanting) / len(plan.sites)
        return found

    def _sites(self, plan: cache.CachePlan) -> list[cache.Site]:
        first = self._named[0] if self.layers else self.dense_layers
        return [site for site in plan.sites if site.layer >= first]

    def _paged(self, site: cache.Site) -> cache.Site:
        return site if site.tail is not None else replace(site, sink=self.sink, tail=self.tail, page=self.page)

    def _reading(self, plan: cache.CachePlan, layers: tuple[int, ...], site: cache.Site) -> cache.Site:
        if self.by != "reuse":
            read = cache.Retrieve(self.by, self.budget)
        elif site.layer in layers:
            read = cache.Retrieve("dense", self.budget)
        else:
            read = cache.Retrieve("reuse", self.budget, _source(plan, site, layers))
        return replace(self._paged(site), retrieve=read)


def _source(plan: cache.CachePlan, site: cache.Site, layers: tuple[int, ...]) -> int | None:
    """The last of `layers` in front of a site that sees the same tokens, or None."""
    return max((at for at in layers if at < site.layer and plan[at].window == site.window), default=None)


def _seen(site: cache.Site) -> str:
    return "every token" if site.window is None else f"a window of {site.window} tokens"
