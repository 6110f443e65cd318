"""Attention over the segments of a cache site as a C++ kernel: one call for any number of rows and new tokens."""

from __future__ import annotations

import weakref
from ctypes import Structure, addressof, c_float, c_int64, c_void_p
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ..ir.cache import Cache, Site
from ..ir.cache.body import Body
from ..ir.errors import SmeltError
from .attention_loaders import Form
from .attention_source import LISTS, chunks, forms, function, scratch
from .unit import Call, packed

__all__ = ["Picks", "SegmentAttention", "covers"]


class Pages(Structure):
    """`Pages` of the template."""

    _fields_ = (
        *((name, c_void_p) for name in ("parts", "steps", "pages", "places", "bias")),
        *((name, c_void_p) for name in ("table", "held", "picks", "picked")),
        *((name, c_int64) for name in ("columns", "longest")),
    )


class Buffers(Structure):
    """`Buffers` of the template."""

    _fields_ = (
        *((name, c_void_p) for name in ("sink_k", "sink_v", "tail_k", "tail_v")),
        *((name, c_void_p) for name in ("bodies", "counts", "sink_at", "turns")),
        *((name, c_int64) for name in ("rows", "width")),
    )


class Arguments(Structure):
    """`Call` of the template."""

    _fields_ = (
        *(("q", c_void_p), ("q_row", c_int64), ("q_head", c_int64), ("q_token", c_int64)),
        *(("out", c_void_p), ("out_row", c_int64), ("out_head", c_int64), ("out_token", c_int64)),
        ("tokens", c_int64),
        *((name, c_void_p) for name in ("positions", "visible", "sinks", "finished", "work")),
        *(("blocks", c_int64), ("scale", c_float), ("softcap", c_float)),
    )


class Picks(NamedTuple):
    """What queries read of the body: entries int32 [B, T, G, n], of which each reads the first `counts` [B, T, G].

    Page numbers where the site retrieves by pages, token numbers page · cap + n where it retrieves tokens.
    """

    entries: torch.Tensor
    counts: torch.Tensor


def covers(site: Site) -> str | None:
    """Why there is no kernel for a site, or None."""
    if site.predict is not None:
        return "a layer's tokens are rebuilt from the layer before, which no kernel does"
    try:
        function(site)
    except (NotImplementedError, SmeltError) as error:
        return str(error)
    return None


class SegmentAttention:
    """The kernel of a site. Layers whose sites differ only in `layer` may share one.

    The kernels of one cache share their scratch memory: one cache runs one call at a time.
    """

    def __init__(self, site: Site) -> None:
        if why := covers(site):
            raise SmeltError(f"cache site of layer {site.layer}: no attention kernel on this target: {why}")
        self.site = site
        self.function = function(site)
        self._work: weakref.WeakKeyDictionary[Cache, tuple[torch.Tensor, torch.Tensor]] = weakref.WeakKeyDictionary()

    def bind(
        self,
        cache: Cache,
        layer: int,
        query: torch.Tensor,
        out: torch.Tensor,
        scale: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        picks: Picks | None = None,
    ) -> Call:
        """out [B, H, T, E] = attention of query [B, H, T, D] over a layer of the cache in its current step.

        All float32; any strides will do where the last dim is contiguous. The window is the site's. Rows of tokens that
        are not valid become 0. `picks`: what is read of the body, where the site retrieves; without it everything is.
        """
        site = cache.plan[layer]
        if cache.device.type != "cpu":
            raise SmeltError(f"layer {layer}: a C++ kernel reads memory of the CPU, but the cache is on {cache.device}")
        if replace(site, layer=self.site.layer) != self.site:
            raise SmeltError(f"layer {layer}: its cache site differs from the one that this kernel was built for")
        rows, tokens = cache.batch, query.shape[2]
        shapes = (rows, site.heads, tokens, site.key_dim), (rows, site.heads, tokens, site.value_dim), (site.heads,)
        for x, shape in zip((query, out, sinks), shapes, strict=True):
            if x is not None and (x.shape != shape or x.dtype is not torch.float32 or x.stride(-1) != 1):
                raise ValueError(
                    f"layer {layer}: attention takes float32 {list(shape)}, contiguous in its last dim, "
                    f"not {x.dtype} {list(x.shape)} with strides {x.stride()}"
                )
        if picks is not None:
            self._check(layer, rows, tokens, picks)
        at, given = Buffers(), Arguments(tokens=tokens, scale=scale, softcap=softcap or 0.0)
        given.q, (given.q_row, given.q_head, given.q_token, _) = query.data_ptr(), query.stride()
        given.out, (given.out_row, given.out_head, given.out_token, _) = out.data_ptr(), out.stride()
        given.sinks = _address(sinks)
        refresh = _Refresh(self, cache, layer, at, given, picks)
        reads = {query.untyped_storage().data_ptr(), ("cache", layer)}
        reads |= {x.untyped_storage().data_ptr() for x in picks or ()}
        return Call(
            self.function,
            packed((addressof(at), addressof(given))),
            frozenset(reads),
            frozenset({out.untyped_storage().data_ptr(), "attention's scratch"}),
            keeps=(at, given, query, out, sinks, picks),
            refresh=refresh,
            steady=True,
        )

    def _check(self, layer: int, rows: int, tokens: int, picks: Picks) -> None:
        """Lists have the right form."""
        site = self.site
        if site.retrieve is None or site.retrieve.by not in LISTS:
            raise ValueError(f"layer {layer}: its site reads the whole body, and takes no list of what to read")
        shape = (rows, tokens, site.kv_heads)
        for x, name in ((picks.entries[..., 0], "entries"), (picks.counts, "counts")):
            if x.shape != shape or x.dtype is not torch.int32:
                raise ValueError(f"layer {layer}: {name} of picks must be int32 {list(shape)}, not {list(x.shape)}")
        if not (picks.entries.is_contiguous() and picks.counts.is_contiguous()):
            raise ValueError(f"layer {layer}: picks must be contiguous")

    def work(self, cache: Cache, places: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Counters and scratch, shared by the layers of a cache: at least so many zeros and floats."""
        counters, floats = self._work.get(cache, (torch.zeros(0, dtype=torch.int32), torch.empty(0)))
        if counters.numel() < places:
            counters = torch.zeros(places, dtype=torch.int32)
        if floats.numel() < size:
            floats = torch.empty(size)
        self._work[cache] = counters, floats
        return counters, floats


class _Refresh:
    """Addresses that may be others in the next step: the step's, and buffers' when the cache's `generation` changes."""

    def __init__(
        self,
        kernel: SegmentAttention,
        cache: Cache,
        layer: int,
        at: Buffers,
        given: Arguments,
        picks: Picks | None,
    ) -> None:
        self.kernel, self.cache, self.layer, self.at, self.given, self.picks = kernel, cache, layer, at, given, picks
        self._generation = -1
        self._held: tuple[Any, ...] = ()

    def __call__(self) -> None:
        step = self.cache.step
        if step is None:
            raise RuntimeError("no step: call begin and append before attending")
        if step.tokens != self.given.tokens:
            raise ValueError(f"layer {self.layer}: bound to {self.given.tokens} new tokens, the step has {step.tokens}")
        if self.cache.generation != self._generation:
            self._fetch()
        self.given.positions, self.given.visible = step.addresses

    def _fetch(self) -> None:
        segments, at = self.cache.segments[self.layer], self.at
        site, turns = segments.site, self.cache.turns(self.layer)
        for name in ("sink_k", "sink_v", "tail_k", "tail_v"):
            setattr(at, name, getattr(segments, name).data_ptr())
        at.counts, at.sink_at = self.cache.counts(self.layer).data_ptr(), _address(segments.sink_at)
        at.turns, at.rows, at.width = _address(turns), self.cache.batch, segments.width
        pairs = list(zip(segments.bodies, forms(site), strict=True))
        bodies = (Pages * max(1, len(pairs)))()
        held = [_fill(pages, body, form) for pages, (body, form) in zip(bodies, pairs, strict=False)]
        if self.picks is not None:
            bodies[0].picks, bodies[0].picked = (x.data_ptr() for x in self.picks)
            bodies[0].longest = self.picks.entries.shape[-1]
        at.bodies = addressof(bodies)
        most = chunks(site, [b.table.shape[2] for b in segments.bodies], segments.width, int(bodies[0].longest))
        size, blocks = scratch(site, at.rows, most, self.given.tokens)
        work = self.kernel.work(self.cache, at.rows * site.kv_heads * blocks, size)
        self.given.blocks = blocks
        self.given.finished, self.given.work = (x.data_ptr() for x in work)
        self._held = bodies, held, work, turns
        self._generation = self.cache.generation


def _fill(pages: Pages, body: Body, form: Form) -> tuple[Any, ...]:
    """Put the addresses of a body's buffers into `pages`; returns what must be kept alive."""
    parts = []
    for part in form.parts:
        if not part.shared:
            parts.append(((body.keys if part.role == "keys" else body.values)[part.name], 0))
            continue
        table = body.tables[part.role].get(part.name, part.sample)  # what needs no data may be missing
        parts.append((table, table.stride(0) if table.shape[0] > 1 else 0))
    addresses = (c_void_p * len(parts))(*(part.data_ptr() for part, _ in parts))
    steps = (c_int64 * len(parts))(*(step for _, step in parts))
    pages.parts, pages.steps = addressof(addresses), addressof(steps)
    pages.pages, pages.places, pages.bias = body.pages.data_ptr(), _address(body.places), _address(body.bias)
    pages.table, pages.held, pages.columns = body.table.data_ptr(), body.held.data_ptr(), body.table.shape[2]
    return addresses, steps, parts


def _address(x: torch.Tensor | None) -> int | None:
    return x.data_ptr() if x is not None else None
