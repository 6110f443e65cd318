"""Attention over the segments of a cache site as a C++ kernel: one call for any number of rows and new tokens."""

from __future__ import annotations

import weakref
from ctypes import Structure, addressof, c_float, c_int64, c_void_p
from dataclasses import replace

import torch

from ..ir.cache import Cache, Site
from ..ir.errors import SmeltError
from .attention_source import PARTS, function, scratch
from .unit import Call, packed

__all__ = ["SegmentAttention", "covers"]


class Buffers(Structure):
    """`Buffers` of the template."""

    _fields_ = (
        *((name, c_void_p) for name in ("sink_k", "sink_v", "tail_k", "tail_v")),
        ("parts", c_void_p * PARTS),
        *((name, c_void_p) for name in ("places", "counts")),
        *((name, c_int64) for name in ("rows", "width", "pages")),
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


def covers(site: Site) -> str | None:
    """Why there is no kernel for a site, or None."""
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
    ) -> Call:
        """out [B, H, T, E] = attention of query [B, H, T, D] over a layer of the cache in its current step.

        All float32; any strides will do where the last dim is contiguous. The window is the site's. Rows of tokens that
        are not valid become 0.
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
        at, given = Buffers(), Arguments(tokens=tokens, scale=scale, softcap=softcap or 0.0)
        given.q, (given.q_row, given.q_head, given.q_token, _) = query.data_ptr(), query.stride()
        given.out, (given.out_row, given.out_head, given.out_token, _) = out.data_ptr(), out.stride()
        given.sinks = sinks.data_ptr() if sinks is not None else None
        refresh = _Refresh(self, cache, layer, at, given)
        reads = {query.untyped_storage().data_ptr(), ("cache", layer)}
        return Call(
            self.function,
            packed((addressof(at), addressof(given))),
            frozenset(reads),
            frozenset({out.untyped_storage().data_ptr(), "attention's scratch"}),
            keeps=(at, given, query, out, sinks),
            refresh=refresh,
        )

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

    def __init__(self, kernel: SegmentAttention, cache: Cache, layer: int, at: Buffers, given: Arguments) -> None:
        self.kernel, self.cache, self.layer, self.at, self.given = kernel, cache, layer, at, given
        self._generation = -1
        self._held: tuple[torch.Tensor, ...] = ()

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
        for name in ("sink_k", "sink_v", "tail_k", "tail_v"):
            setattr(at, name, getattr(segments, name).data_ptr())
        at.places = segments.places.data_ptr() if segments.places is not None else None
        at.counts = self.cache.counts(self.layer).data_ptr()
        at.rows, at.width, at.pages = self.cache.batch, segments.width, segments.slots
        for slot, part in enumerate((*segments.keys.values(), *segments.values.values())):
            at.parts[slot] = part.data_ptr()
        size, blocks = scratch(segments.site, at.rows, segments.slots, segments.width, self.given.tokens)
        self._held = self.kernel.work(self.cache, at.rows * segments.site.kv_heads * blocks, size)
        self.given.blocks = blocks
        self.given.finished, self.given.work = (held.data_ptr() for held in self._held)
        self._generation = self.cache.generation
