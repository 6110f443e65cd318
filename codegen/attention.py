"""Attention over the segments of a cache site as a C++ kernel: one call for any number of rows and new tokens."""

from __future__ import annotations

import weakref
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p
from dataclasses import replace

import torch

from ..ir.cache import Cache, Site
from ..ir.cache.step import Step
from ..ir.errors import SmeltError
from .attention_source import PARTS, scratch, source
from .build import build, threads

__all__ = ["Bound", "SegmentAttention", "covers", "source"]


class Buffers(Structure):
    """`Buffers` of the template."""

    _fields_ = (
        *((name, c_void_p) for name in ("sink_k", "sink_v", "tail_k", "tail_v")),
        ("parts", c_void_p * PARTS),
        *((name, c_void_p) for name in ("places", "counts")),
        *((name, c_int64) for name in ("rows", "width", "pages")),
    )


class Call(Structure):
    """`Call` of the template."""

    _fields_ = (
        *(("q", c_void_p), ("q_row", c_int64), ("q_head", c_int64), ("q_token", c_int64)),
        *(("out", c_void_p), ("out_row", c_int64), ("out_head", c_int64), ("out_token", c_int64)),
        ("tokens", c_int64),
        *((name, c_void_p) for name in ("positions", "visible", "sinks", "work")),
        *(("scale", c_float), ("softcap", c_float), ("threads", c_int32)),
    )


def covers(site: Site) -> str | None:
    """Why there is no kernel for a site, or None."""
    try:
        source(site)
    except (NotImplementedError, SmeltError) as error:
        return str(error)
    return None


class SegmentAttention:
    """The built kernel of a site. Layers whose sites differ only in `layer` may share one.

    The kernels of one cache share their scratch memory: one cache runs one call at a time.
    """

    def __init__(self, site: Site) -> None:
        if why := covers(site):
            raise SmeltError(f"cache site of layer {site.layer}: no attention kernel on this target: {why}")
        self.site = site
        self.source = source(site)
        library = build(self.source, f"attention_{site.heads}x{site.kv_heads}x{site.key_dim}")
        self.run = library.attend
        self.run.argtypes, self.run.restype = [POINTER(Buffers), POINTER(Call)], None
        self._work: weakref.WeakKeyDictionary[Cache, torch.Tensor] = weakref.WeakKeyDictionary()

    def bind(self, cache: Cache, layer: int) -> Bound:
        """A call that attends over one layer of a cache."""
        site = cache.plan[layer]
        if cache.device.type != "cpu":
            raise SmeltError(f"layer {layer}: a C++ kernel reads memory of the CPU, but the cache is on {cache.device}")
        if replace(site, layer=self.site.layer) != self.site:
            raise SmeltError(f"layer {layer}: its cache site differs from the one that this kernel was built for")
        return Bound(self, cache, layer)

    def work(self, cache: Cache, size: int) -> torch.Tensor:
        """Scratch of at least `size` floats, shared by the layers of a cache."""
        held = self._work.get(cache)
        if held is None or held.numel() < size:
            held = self._work[cache] = torch.empty(size)
        return held


class Bound:
    """A kernel on one layer of a cache; calling it allocates nothing.

    Buffers move when the cache's `generation` says so; their addresses are fetched again then.
    """

    def __init__(self, kernel: SegmentAttention, cache: Cache, layer: int) -> None:
        self.kernel, self.cache, self.layer = kernel, cache, layer
        self._buffers, self._call = Buffers(), Call(threads=threads())
        self._references = byref(self._buffers), byref(self._call)
        self._generation = -1
        self._step: Step | None = None
        self._shapes: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
        self._work: torch.Tensor | None = None

    def __call__(
        self,
        q: torch.Tensor,
        out: torch.Tensor,
        scale: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """out [B, H, T, E] = attention of q [B, H, T, D] over the layer in the cache's current step; both float32.

        The window is the site's. Any strides will do where the last dim is contiguous. Rows of tokens that are not
        valid become 0.
        """
        call = self._call
        if self.cache.generation != self._generation:
            self._fetch()
        if self.cache.step is not self._step or self._step is None:
            self._enter()
        self._check(q, self._shapes[0])
        self._check(out, self._shapes[1])
        call.q, (call.q_row, call.q_head, call.q_token, _) = q.data_ptr(), q.stride()
        call.out, (call.out_row, call.out_head, call.out_token, _) = out.data_ptr(), out.stride()
        if sinks is not None:
            self._check(sinks, (self.kernel.site.heads,))
        call.sinks = sinks.data_ptr() if sinks is not None else None
        call.scale, call.softcap = scale, softcap or 0.0
        self.kernel.run(*self._references)

    def _check(self, x: torch.Tensor, shape: tuple[int, ...]) -> None:
        if x.shape != shape or x.dtype is not torch.float32 or x.stride(-1) != 1:
            raise ValueError(
                f"layer {self.layer}: attention takes float32 {list(shape)}, contiguous in its last dim, "
                f"not {x.dtype} {list(x.shape)} with strides {x.stride()}"
            )

    def _fetch(self) -> None:
        """Addresses of the layer's buffers."""
        segments, at = self.cache.segments[self.layer], self._buffers
        for name in ("sink_k", "sink_v", "tail_k", "tail_v"):
            setattr(at, name, getattr(segments, name).data_ptr())
        at.places = segments.places.data_ptr() if segments.places is not None else None
        at.counts = self.cache.counts(self.layer).data_ptr()
        at.rows, at.width, at.pages = self.cache.batch, segments.width, segments.slots
        for slot, part in enumerate((*segments.keys.values(), *segments.values.values())):
            at.parts[slot] = part.data_ptr()
        size = scratch(segments.site, self.cache.batch, segments.slots, segments.width)
        self._work = self.kernel.work(self.cache, size)
        self._call.work = self._work.data_ptr()
        self._generation, self._step = self.cache.generation, None

    def _enter(self) -> None:
        """Addresses of the current step's positions and bitset."""
        step = self.cache.step
        if step is None:
            raise RuntimeError("no step: call begin and append before attending")
        self._step, call = step, self._call
        call.tokens = step.tokens
        rows, site = (self.cache.batch, self.kernel.site.heads, step.tokens), self.kernel.site
        self._shapes = (*rows, site.key_dim), (*rows, site.value_dim)
        call.positions, call.visible = step.positions.data_ptr(), step.words.data_ptr()
