"""Triton kernels of single nodes: a norm that several read, rounding of activations, rows of a table; and attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import fx

from ..ir.cache import Site
from ..ir.encoding.expr import stored
from ..ir.errors import SmeltError
from ..ir.ops import ROTARY, arguments, is_op
from ..ir.weight import Weight
from . import rows_triton
from .attention import Picks
from .attention_triton import Launch, TritonAttention
from .attention_triton import source as attention_source
from .attention_triton_lists import blank, fill
from .attention_triton_queries import append_queries
from .hyper_triton import TritonHyperAttention
from .plan import Out, Run
from .printers import triton as printer
from .product_triton import POINTERS
from .regions_triton import Fused, Room
from .rows import row_stride
from .triton_module import load

BLOCK = 1024  # elements of a program


@dataclass(frozen=True)
class NormKernel:
    """`rms_norm` by itself."""

    name: str = "triton.rms_norm"

    @property
    def source(self) -> str:
        return rows_triton.SOURCE

    def contiguous(self, args: Mapping[str, Any]) -> tuple[str, ...]:
        return () if row_stride(args["x"]) >= 0 else ("x",)

    def bind(self, args: Mapping[str, Any], out: Out) -> Run:
        assert isinstance(out, torch.Tensor)
        x, width = args["x"], out.shape[-1]
        rest = args["weight"], float(args["eps"]), float(args["offset"])
        return partial(rows_triton.rms_norm, x.reshape(-1, width), out.view(-1, width), *rest)


@dataclass(frozen=True)
class RoundKernel:
    """`quantized`: activations rounded to integers in groups, as values."""

    name: str = "triton.quantized"

    @property
    def source(self) -> str:
        return _ROUND

    def contiguous(self, args: Mapping[str, Any]) -> tuple[str, ...]:
        return () if args["x"].is_contiguous() else ("x",)

    def bind(self, args: Mapping[str, Any], out: Out) -> Run:
        assert isinstance(out, torch.Tensor)
        x, group, levels = args["x"], int(args["group"]) or out.shape[-1], float(2 ** (int(args["bits"]) - 1) - 1)
        width = 1 << (group - 1).bit_length()
        groups, block = x.numel() // group, max(1, BLOCK // width)
        grid, sides = (-(-groups // block),), {"GROUPS": block, "WIDTH": width}
        return lambda: _round().quantized[grid](x, out, groups, group, levels, **sides)


@dataclass(frozen=True)
class GatherKernel:
    """`embedding` from a table in any encoding; an id that is no row of it reads NaN."""

    weight: Weight

    @property
    def name(self) -> str:
        return f"triton.gather.{self.weight.encoding.name}"

    @cached_property
    def source(self) -> str:
        expr = self.weight.encoding.expr((None, self.weight.shape[1]))
        value = printer.text(expr, row_mask="known", column_mask="inside")
        return _GATHER.format(parts=", ".join(stored(expr)), value=value, encoding=self.weight.encoding)

    def contiguous(self, args: Mapping[str, Any]) -> tuple[str, ...]:
        return () if args["ids"].is_contiguous() else ("ids",)

    def bind(self, args: Mapping[str, Any], out: Out) -> Run:
        assert isinstance(out, torch.Tensor)
        ids, (count, width) = args["ids"], self.weight.shape
        expr = self.weight.encoding.expr((None, width))
        parts = {name: self.weight.parts[name] for name in stored(expr)}
        kernel, grid = _module(self.source), (ids.numel(), -(-width // BLOCK))
        return lambda: kernel.gather[grid](ids=ids, y=out, V=count, K=width, BLOCK=BLOCK, **parts)


def gather_refuses(weight: Weight) -> str | None:
    """Why rows of a table have no kernel, or None."""
    if len(weight.shape) != 2:
        return f"a table must be two-dimensional, not {list(weight.shape)}"
    try:
        expr = weight.encoding.expr((None, weight.shape[1]))
    except SmeltError as error:  # its value is no expression
        return str(error)
    if expr.dtype != "float32":
        return f"the table's values are {expr.dtype}, not float32"
    strange = [dtype for dtype in stored(expr).values() if dtype not in POINTERS]
    return f"{weight.encoding} stores {strange[0]}, which no kernel loads" if strange else None


@dataclass(frozen=True, eq=False)
class AttentionKernel:
    """Rotary, append and attention of a layer: three launches, the same whatever the cache holds.

    One more where queries are kept for scores; where the site retrieves, those that list what is read.
    """

    region: Fused
    site: Site
    made: dict[Site, TritonAttention]  # shared between the layers of a plan

    @property
    def name(self) -> str:
        stored = "dense" if self.site.keys is None and self.site.values is None else "segments"
        turned = ".rotary" if self.region.before else ""
        return f"triton.attention{turned}.{stored}.{self.site.heads}x{self.site.kv_heads}x{self.site.key_dim}"

    @property
    def source(self) -> str:
        return f"{rows_triton.SOURCE}\n\n{_attention_source(self.site)}"

    def bind(self, room: Room) -> tuple[dict[fx.Node, torch.Tensor], list[Run]]:
        """The attention's output, [B, T, H, E] in memory, and the calls that append and attend."""
        node, cache = self.region.at, room.cache
        assert cache is not None
        args = arguments(node)
        layer, scale = int(args["layer"]), float(args["scale"])
        given = [arguments(each)["x"] for each in self.region.before] or [args["query"], args["key"]]
        q, k, v = (self._even(room, each) for each in (*given, args["value"]))
        turn, positions = self._turn(room, q)
        sinks = None if args["sinks"] is None else room.value(args["sinks"])
        cache.segments[layer].sink_logits = sinks
        turned = room.spare(*q.shape)
        out = room.take(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
        plain = args["window"] is None and args["softcap"] is None and sinks is None
        whole = self._of_prompts if plain and self._long(q.shape[2]) else None
        launches: tuple[Launch, ...] = ()
        retrieve = self.site.retrieve
        lists: Picks | None = None
        generation = -1, False

        def append() -> None:
            segments, step = cache.segments[layer], cache.step
            assert step is not None
            at = step.positions if positions is None else positions
            rows_triton.rotate_append(
                q, k, v, turned, segments.tail_k, segments.tail_v, at, cache.counts(layer), **turn
            )
            if segments.tail_q is not None:
                append_queries(turned, segments.tail_q, cache.counts(layer))

        def attend() -> None:
            nonlocal launches, generation, lists
            if whole is not None:
                whole(cache, layer, turned, out, scale)
                return
            some = retrieve is not None  # a prompt is in the tail as a whole, unless it is read in chunks
            if some and cache.prefilling:
                some = bool(cache.segments[layer].bodies[0].host_held.any())
            if generation != (cache.generation, some):
                lists = blank(cache, layer, q.shape[2]) if some else None
                read = lists if retrieve is not None and retrieve.by != "dense" else None
                launches = self._made.launches(cache, layer, turned, out, scale, args["softcap"], sinks, read)
                generation = cache.generation, some
            if lists is not None:
                fill(cache, layer, turned, lists, scale, args["softcap"])
            for launch in launches:
                launch()

        return {node: out}, [append, attend]

    def _long(self, tokens: int) -> bool:
        """Whether a step of so many tokens is a prompt that is approximated."""
        return self.site.hyper is not None and tokens > self.site.hyper.min_seq_len

    @cached_property
    def _of_prompts(self) -> TritonHyperAttention:
        assert self.site.hyper is not None
        return TritonHyperAttention(self.site, self.site.hyper)

    def _turn(self, room: Room, q: torch.Tensor) -> tuple[dict[str, Any], torch.Tensor | None]:
        """The arguments of rotary, and its positions; nothing where none is fused."""
        if not self.region.before:
            return {}, None
        assert all(is_op(each, ROTARY) for each in self.region.before)
        args = arguments(self.region.before[0])
        positions = room.value(args["positions"]).expand(q.shape[0], q.shape[2])
        return (
            {"inv_freq": room.value(args["inv_freq"]), "scale": float(args["scale"])},
            positions if positions.is_contiguous() else room.copy(positions),
        )

    @staticmethod
    def _even(room: Room, node: fx.Node) -> torch.Tensor:
        x = room.value(node)
        return x if x.stride(-1) == 1 else room.copy(x)

    @property
    def _made(self) -> TritonAttention:
        if self.site not in self.made:
            self.made[self.site] = TritonAttention(self.site)
        return self.made[self.site]


@cache
def _attention_source(site: Site) -> str:
    return attention_source(site)


@cache
def _module(text: str) -> Any:
    return load(text, "gather")


@cache
def _round() -> Any:
    return load(_ROUND, "quantized")


_GATHER = '''\
"""Rows of a table in {encoding}"""

import triton
import triton.language as tl


@triton.jit
def gather(ids, y, {parts}, V, K, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.load(ids + row + tl.zeros((1, 1), tl.int64))
    k = (tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[None, :]
    known = (n >= 0) & (n < V)
    inside = k < K
    value = {value}
    tl.store(y + row * K + k, tl.where(known, value, float("nan")), mask=inside)
'''

_ROUND = '''\
"""Activations rounded to integers in groups, as values: round(x / s) * s with s = max|x| / levels"""

import triton
import triton.language as tl


@triton.jit
def quantized(x, y, M, K, levels, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    m = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]
    k = tl.arange(0, WIDTH)[None, :]
    inside = (m < M) & (k < K)
    v = tl.load(x + m * K + k, mask=inside, other=0)
    scale = tl.div_rn(tl.max(tl.abs(v), 1, keep_dims=True), levels + tl.zeros((GROUPS, 1), tl.float32))
    codes = tl.div_rn(v, tl.where(scale == 0, 1.0, scale) + tl.zeros_like(v))
    codes = (codes + 12582912.0) - 12582912.0  # adding 1.5 * 2^23 rounds to the nearest integer, halves to even
    tl.store(y + m * K + k, codes * scale, mask=inside)
'''
