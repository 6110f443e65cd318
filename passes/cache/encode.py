"""Stores the tokens that leave the tail in fewer bits (KIVI: A Tuning-Free Asymmetric 2bit Quantization, 2024)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from ...ir.cache import CachePlan, Site
from ...ir.encoding import Encoding
from ...ir.errors import SmeltError
from ...ir.program import Program
from .._contracts import cached_decoder
from ..base import Effect, Exactness, Outcome, Pass, Samples
from ._sites import PAGE, SINK, TAIL, changed, faults


@dataclass(frozen=True)
class Encode(Pass):
    """Sets how pages of the cache are stored once they leave the tail; sinks and tail stay dense.

    keys: encoding of keys, such as {affine: {bits: 4, axis: channel, group: 32, zero: true}}; absent: dense.
    values: encoding of values, such as {affine: {bits: 4, axis: token, group: 32, zero: true}}; absent: dense.
    sink: first tokens of a sequence, which stay dense.
    tail: newest tokens, which stay dense until they are older.
    page: tokens that leave together.

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

    def __post_init__(self) -> None:
        if self.keys is None and self.values is None:
            raise SmeltError("give an encoding for keys, values or both")

    def requires(self, program: Program) -> Iterator[str]:
        """A cache plan whose sites are dense where this step encodes, with pages that the encodings can hold."""
        yield from cached_decoder(program)
        if program.cache is None:
            return
        for site in program.cache.sites:
            for role, new, old in (("keys", self.keys, site.keys), ("values", self.values, site.values)):
                if new is not None and old is not None:
                    yield (
                        f"{role} of layer {site.layer} must be dense, but are {old}{program.changed_by('cache')}: "
                        "a cache is encoded once"
                    )
                    return
        yield from faults(program.cache.sites, self._encoding(program.cache))

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Set the encodings of every site that keeps anything beyond its tail."""
        assert program.cache is not None
        sites = [site for site in program.cache.sites if site.kept]
        skipped = {
            f"layer {site.layer}": "nothing outlives its tail (budget 0)"
            for site in program.cache.sites
            if not site.kept
        }
        program.cache = changed(program.cache, sites, self._encoding(program.cache))
        program.touch("cache")
        return Outcome(tuple(f"layer {site.layer}" for site in sites), skipped)

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
