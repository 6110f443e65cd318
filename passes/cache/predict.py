"""Stores of each layer what a forecast from the layer before misses (AQUA-KV: Cache Me If You Must, 2025)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ...ir import cache
from ...ir.cache.predict import fitted, foretold, merged
from ...ir.encoding import Encoding
from ...ir.errors import SmeltError
from ...ir.program import Program
from .._contracts import cached_decoder
from ..base import Calibration, Effect, Exactness, Outcome, Pass, Samples
from ._calibrate import written
from ._sites import changed, faults


@dataclass(frozen=True)
class Predict(Pass):
    """Fits linear maps from one layer's stored keys and values to the next one's, and encodes what they miss.

    damp: of the ridge regression, relative to the mean of its diagonal.

    The maps are fitted layer by layer to what the encodings in front of this step leave of the layer before, so that
    they see the errors that they will see; tables of encodings are fitted again, to what the forecast misses. The maps
    take d² + d numbers for keys and 2 d² + d for values of a layer of d numbers, which the report counts. Reading takes
    6 d² operations a token and layer: this saves memory, not time, and no kernel does it; attention falls back to its
    reference.
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    effects: ClassVar[frozenset[Effect]] = frozenset({"numerics", "encodings", "cache"})

    damp: float = 1e-3

    def __post_init__(self) -> None:
        if not 0.0 <= self.damp < 1.0:
            raise SmeltError(f"damp is a share of the diagonal's mean, from 0 to 1, not {self.damp}")

    @property
    def calibration(self) -> Calibration:
        return "text"

    def requires(self, program: Program) -> Iterator[str]:
        """Encoded sites in the frame pre that keep every token, of one shape and one schedule."""
        yield from cached_decoder(program)
        if program.cache is None:
            return
        sites = program.cache.sites
        if len(sites) < 2:
            yield "a forecast needs a layer before: the cache has one layer"
        for site in sites:
            since = program.changed_by("cache")
            if site.predict is not None:
                yield f"layer {site.layer} already stores what a forecast misses{since}: keep one of the two steps"
                return
            if site.keys is None or site.values is None:
                yield f"keys and values of layer {site.layer} must be encoded, but are dense: put cache.encode in front"
                return
        shapes = {(s.kv_heads, s.key_dim, s.value_dim, s.sink, s.tail, s.page) for s in sites}
        if len(shapes) > 1:
            yield f"all layers must have one shape and let the same pages go, but have {len(shapes)} kinds"
        yield from faults(sites, self._predicted(sites))

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Fit the maps in the order of layers, and note by how much each forecast shrinks what is stored."""
        assert program.cache is not None and samples is not None
        sites, found = program.cache.sites, written(program, samples)
        tables: dict[str, torch.Tensor] = {}
        gains: dict[str, float] = {}
        keys, values = None, None
        for site in sites:
            data = {role: found[site.layer, role].paged(site.page) for role in ("keys", "values")}
            k, v = data["keys"].x, data["values"].x
            told_k, told_v = torch.zeros_like(k), torch.zeros_like(v)
            if keys is not None and values is not None:
                tables[f"{site.layer}.predict.keys"] = by_keys = fitted(merged(keys), merged(k), self.damp).half()
                told_k = foretold(merged(keys), by_keys, site.kv_heads)
            own = site.key_encoding.fit(k - told_k, data["keys"].weight)
            tables |= _named(site, "keys", own)
            stored_k = told_k + _stored(site.key_encoding, k - told_k, site.page, own)
            if keys is not None and values is not None:
                seen = torch.cat([merged(stored_k), merged(values)], 1)
                tables[f"{site.layer}.predict.values"] = by_values = fitted(seen, merged(v), self.damp).half()
                told_v = foretold(seen, by_values, site.kv_heads)
                gains[f"layer {site.layer}"] = round(_bits(k, told_k) / 2 + _bits(v, told_v) / 2, 3)
            own = site.value_encoding.fit(v - told_v, data["values"].weight)
            tables |= _named(site, "values", own)
            keys, values = stored_k, told_v + _stored(site.value_encoding, v - told_v, site.page, own)
        program.cache = changed(program.cache, sites, self._predicted(sites)).with_tables(tables)
        program.touch("cache")
        return Outcome(tuple(f"layer {site.layer}" for site in sites), {}, {"bits saved by the forecast": gains})

    def _predicted(self, sites: tuple[cache.Site, ...]) -> Callable[[cache.Site], cache.Site]:
        return lambda site: replace(site, predict=cache.Predict(first=site.layer == sites[0].layer))


def _named(site: cache.Site, role: str, tables: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tables of an encoding as a plan holds them: those that come from data."""
    encoding = site.key_encoding if role == "keys" else site.value_encoding
    return {f"{site.layer}.{role}.{part}": table for part, table in tables.items()} if encoding.calibrated else {}


def _stored(encoding: Encoding, x: torch.Tensor, page: int, tables: dict[str, torch.Tensor]) -> torch.Tensor:
    """What x [G, n, D], which fills whole pages, becomes when it is stored."""
    pages = x.unflatten(1, (-1, page))
    spread = {name: table[:, None] for name, table in tables.items()}
    parts = encoding.encode(pages, spread) if spread else encoding.encode(pages)
    return encoding.decode({**parts, **spread}, tuple(pages.shape)).flatten(1, 2)


def _bits(x: torch.Tensor, told: torch.Tensor) -> float:
    """Bits a number that a forecast is worth: -½ log2 of the part of the variance that it misses."""
    spread = (x - x.mean(1, keepdim=True)).square().sum() + 1e-30
    return -0.5 * math.log2(float((x - told).square().sum() / spread) + 1e-30)
