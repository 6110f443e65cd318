"""HyperAttention (arXiv:2310.05869) of whole prompts as a C++ kernel: one call for any number of rows."""

from __future__ import annotations

import weakref
from ctypes import Structure, addressof, c_float, c_int64, c_uint32, c_void_p

import torch

from ..ir.cache import Cache, Site
from ..ir.cache.hyper import Hyper, key_of, planes
from ..ir.errors import SmeltError
from .attention_header import HEADER
from .attention_loaders import dense_row
from .hyper_layout import Layout, layout
from .hyper_template import KERNEL
from .printers.cpp import CTYPES
from .rows_source import MATH
from .unit import Call, Function, packed

WIDE = 8  # bits of a hash that one vector of doubles sums


class Given(Structure):
    """`Given` of the template."""

    _fields_ = (
        *(("q", c_void_p), ("q_row", c_int64), ("q_head", c_int64), ("q_token", c_int64)),
        *(("out", c_void_p), ("out_row", c_int64), ("out_head", c_int64), ("out_token", c_int64)),
        *(("keys", c_void_p), ("values", c_void_p)),
        *((name, c_int64) for name in ("width", "tokens", "rows")),
        *((name, c_void_p) for name in ("planes", "lengths", "codes", "orders", "state")),
        *((name, c_void_p) for name in ("exact", "pieces", "parts", "until", "starts")),
        *((name, c_int64) for name in ("exacts", "pieces_count", "levels")),
        *(("scale", c_float), ("key", c_uint32)),
    )


def covers(site: Site) -> str | None:
    """Why prompts of a site cannot be read so, or None."""
    return f"a window of {site.window} tokens bounds what a query reads already" if site.window is not None else None


def function(site: Site, options: Hyper) -> Function:
    """A site's kernel, whose word is the address of a `Given`."""
    text = KERNEL.substitute(
        name="$name",
        heads=site.heads,
        groups=site.kv_heads,
        key_dim=site.key_dim,
        value_dim=site.value_dim,
        block=options.block,
        sample=options.sample,
        sink=options.sink,
        bits=options.projections,
        dense=CTYPES[site.dense],
        dense_keys=_lines(dense_row(site.dense, site.key_dim)),
        dense_values=_lines(dense_row(site.dense, site.value_dim)),
    )
    return Function.of(f"hyper.{site.heads}x{site.kv_heads}x{site.key_dim}", text, (MATH, HEADER))


class HyperAttention:
    """The kernel of a site for steps that bring the whole prompt of every row, into a cache that is empty.

    Whatever else comes (a second piece of a prompt, a decoded token, a tree) is read by the kernel for segments.
    """

    def __init__(self, site: Site, options: Hyper) -> None:
        if why := covers(site):
            raise SmeltError(f"cache site of layer {site.layer}: no HyperAttention: {why}")
        self.site, self.options = site, options
        self.function = function(site, options)
        self._scratch: weakref.WeakKeyDictionary[Cache, tuple[torch.Tensor, ...]] = weakref.WeakKeyDictionary()

    def bind(self, cache: Cache, layer: int, query: torch.Tensor, out: torch.Tensor, scale: float) -> Call:
        """out [B, H, T, E] = attention of the query [B, H, T, D] of a prompt whose keys and values were appended.

        Both float32; any strides will do where the last dim is contiguous. Rows of padding become 0.
        """
        site, rows, tokens = self.site, cache.batch, query.shape[2]
        shapes = (rows, site.heads, tokens, site.key_dim), (rows, site.heads, tokens, site.value_dim)
        for x, shape in zip((query, out), shapes, strict=True):
            if x.shape != shape or x.dtype is not torch.float32 or x.stride(-1) != 1:
                raise ValueError(
                    f"layer {layer}: HyperAttention takes float32 {list(shape)}, contiguous in its last dim, "
                    f"not {x.dtype} {list(x.shape)} with strides {x.stride()}"
                )
        given = Given(tokens=tokens, rows=rows, scale=scale, key=key_of(self.options, layer))
        given.q, (given.q_row, given.q_head, given.q_token, _) = query.data_ptr(), query.stride()
        given.out, (given.out_row, given.out_head, given.out_token, _) = out.data_ptr(), out.stride()
        normals = planes(self.options, site.key_dim, layer).double()
        padded = torch.zeros(site.key_dim, -(-self.options.projections // WIDE) * WIDE, dtype=torch.float64)
        padded[:, : self.options.projections] = normals.T
        given.planes = padded.data_ptr()
        return Call(
            self.function,
            packed((addressof(given),)),
            frozenset({query.untyped_storage().data_ptr(), ("cache", layer)}),
            frozenset({out.untyped_storage().data_ptr(), "the scratch of HyperAttention"}),
            keeps=(given, query, out, padded),
            refresh=_Refresh(self, cache, layer, given),
        )

    def scratch(self, cache: Cache, tokens: int, levels: int) -> tuple[torch.Tensor, ...]:
        """Buckets, orders and sums, shared by the layers of a cache that this kernel serves."""
        rows, sides = cache.batch, self.site.heads + self.site.kv_heads
        held = self._scratch.get(cache)
        if held is None or held[0].shape[2] != tokens or held[1].shape[0] < levels:
            held = (
                torch.empty(rows, sides, tokens, dtype=torch.int16),
                torch.empty(levels, rows, sides, tokens, dtype=torch.int32),
                torch.empty(rows, self.site.heads, tokens, 2),
            )
            self._scratch[cache] = held
        return held


class _Refresh:
    """What depends on the step: the lengths of its prompts, the tables that follow, and where buffers lie."""

    def __init__(self, kernel: HyperAttention, cache: Cache, layer: int, given: Given) -> None:
        self.kernel, self.cache, self.layer, self.given = kernel, cache, layer, given
        self._held: tuple[Layout | torch.Tensor, ...] = ()

    def __call__(self) -> None:
        cache, given, step = self.cache, self.given, self.cache.step
        if step is None:
            raise RuntimeError("no step: call begin and append before attending")
        lengths = whole_prompts(cache, self.layer)
        tables = layout(lengths, given.tokens, self.kernel.options)
        counts = torch.tensor(lengths, dtype=torch.int32)
        codes, orders, state = self.kernel.scratch(cache, given.tokens, len(tables.until))
        segments = cache.segments[self.layer]
        given.keys, given.values = segments.tail_k.data_ptr(), segments.tail_v.data_ptr()
        given.width, given.lengths = segments.width, counts.data_ptr()
        given.codes, given.orders, given.state = codes.data_ptr(), orders.data_ptr(), state.data_ptr()
        for name in ("exact", "pieces", "parts", "until", "starts"):
            setattr(given, name, getattr(tables, name).data_ptr())
        given.exacts, given.pieces_count, given.levels = len(tables.exact), len(tables.pieces), len(tables.until)
        self._held = (tables, counts, codes, orders, state)


def whole_prompts(cache: Cache, layer: int) -> tuple[int, ...]:
    """Tokens of each row in the current step, which must be all that the row has, one behind the other."""
    step = cache.step
    assert step is not None
    if any(cache.lengths) or step.ancestors is not None or not cache.prefilling:
        raise ValueError(f"layer {layer}: HyperAttention reads whole prompts, and this step continues a row")
    lengths = step.valid.sum(1)
    if not torch.equal(step.valid, torch.arange(step.tokens, device=lengths.device) < lengths[:, None]):
        raise ValueError(f"layer {layer}: HyperAttention takes prompts that are padded behind their last token")
    return tuple(lengths.tolist())


def _lines(lines: list[str]) -> str:
    return "\n".join("  " + line for line in lines)
