"""Stores the tokens that leave the tail in fewer bits (KIVI: A Tuning-Free Asymmetric 2bit Quantization, 2024)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from ...ir.cache import CachePlan, Site
from ...ir.encoding import Encoding
from ...ir.errors import SmeltError
from ...ir.program import Program
from .._contracts import cached_decoder
from ..base import Calibration, Effect, Exactness, Outcome, Pass, Samples
from ._calibrate import tables, written
from ._sites import PAGE, SINK, TAIL, changed, faults


@dataclass(frozen=True)
class Encode(Pass):
    """Sets how pages of the cache are stored once they leave the tail; sinks and tail stay dense.

    keys: encoding of keys, such as {affine: {bits: 4, axis: channel, group: 32, zero: true}}; absent: dense.
    values: encoding of values, such as {affine: {bits: 4, axis: token, group: 32, zero: true}}; absent: dense.
    sink: first tokens of a sequence, which stay dense.
    tail: newest tokens, which stay dense until they are older.
    page: tokens that leave together.
    layers: the layers that are encoded (null: all; rest: those that no step in front encoded).

    sink, tail and page are those of the plan where they are not given, or 4, 64 and 64 where the plan has none.

    Deviation: in the paper keys leave the tail a page at a time and values one by one; here a page of both leaves.
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    effects: ClassVar[frozenset[Effect]] = frozenset({"numerics", "encodings", "cache"})

    keys: Encoding | None = None
    values: Encoding | None = None
    sink: int | None = None
    tail: int | None = None
    page: int | None = None
    layers: tuple[int, ...] | Literal["rest"] | None = None

    def __post_init__(self) -> None:
        if self.keys is None and self.values is None:
            raise SmeltError("give an encoding for keys, values or both")

    @property
    def calibration(self) -> Calibration:
        """Text where an encoding has tables that come from data."""
        return "text" if any(e is not None and e.calibrated for e in (self.keys, self.values)) else "none"

    def requires(self, program: Program) -> Iterator[str]:
        """A cache plan whose sites are dense where this step encodes, with pages that the encodings can hold."""
        yield from cached_decoder(program)
        if program.cache is None:
            return
        known = [site.layer for site in program.cache.sites]
        named = self.layers if isinstance(self.layers, tuple) else ()
        if unknown := sorted(set(named) - set(known)):
            yield f"layers names layer {unknown[0]}, but the cache has the layers {known[0]} to {known[-1]}"
        for site in self._asked(program.cache):
            for role, new, old in (("keys", self.keys, site.keys), ("values", self.values, site.values)):
                if new is not None and old is not None:
                    yield (
                        f"{role} of layer {site.layer} must be dense, but are {old}{program.changed_by('cache')}: "
                        "a cache is encoded once"
                    )
                    return
        yield from faults(self._asked(program.cache), self._encoding(program.cache))

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Set the encodings of every site that keeps anything beyond its tail."""
        assert program.cache is not None
        asked = self._asked(program.cache)
        sites = [site for site in asked if site.kept]
        skipped = {f"layer {s.layer}": "nothing outlives its tail (budget 0)" for s in asked if not s.kept}
        skipped |= {f"layer {s.layer}": "not among layers" for s in program.cache.sites if s not in asked}
        program.cache = changed(program.cache, sites, self._encoding(program.cache))
        if self.calibration == "text":
            assert samples is not None
            kept = [program.cache[site.layer] for site in sites]
            program.cache = program.cache.with_tables(tables(kept, written(program, samples)))
        program.touch("cache")
        return Outcome(tuple(f"layer {site.layer}" for site in sites), skipped)

    def _asked(self, plan: CachePlan) -> list[Site]:
        if self.layers == "rest":
            return [site for site in plan.sites if site.keys is None and site.values is None]
        return [site for site in plan.sites if self.layers is None or site.layer in self.layers]

    def _encoding(self, plan: CachePlan) -> Callable[[Site], Site]:
        """The change of one site; what is not given follows the site, else the first site that has pages."""

        def change(site: Site) -> Site:
            like = next((s for s in (site, *plan.sites) if s.tail is not None), None)
            sink, tail, page = (like.sink, like.tail, like.page) if like else (SINK, TAIL, PAGE)
            return replace(
                site,
                keys=self.keys or site.keys,
                values=self.values or site.values,
                sink=sink if self.sink is None else self.sink,
                tail=tail if self.tail is None else self.tail,
                page=page if self.page is None else self.page,
            )

        return change
