"""Kernels behind one interface: generated C++, out-variants of ATen ops, and the reference as the last resort."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from ..ir.cache import Cache, Site
from ..ir.weight import Weight
from . import attention, hyper
from .append import append
from .plan import Out, Run
from .retrieve import retrieve
from .rows import RowKernel


@dataclass(frozen=True)
class AttentionKernel:
    """`cached_attention` over the segments of one kind of site; layers with equal sites share the kernel."""

    site: Site

    @property
    def name(self) -> str:
        stored = "dense" if self.site.keys is None and self.site.values is None else "segments"
        return f"attention.{stored}.{self.site.heads}x{self.site.kv_heads}x{self.site.key_dim}"

    @property
    def source(self) -> str:
        return self._built.function.source

    @cached_property
    def _built(self) -> attention.SegmentAttention:
        return attention.SegmentAttention(self.site)

    @cached_property
    def _of_prompts(self) -> hyper.HyperAttention:
        assert self.site.hyper is not None
        return hyper.HyperAttention(self.site, self.site.hyper)

    def contiguous(self, args: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(name for name in ("query", "key", "value") if args[name].stride(-1) != 1)

    def attend(self, cache: Cache, args: Mapping[str, Any], out: torch.Tensor) -> list[Run]:
        """Calls that append to the layer of the cache that `args["layer"]` names, list what is read, and attend.

        `out` [B, H, T, E] may have any strides.
        """
        layer, rest = int(args["layer"]), (float(args["scale"]), args["softcap"], args["sinks"])
        cache.segments[layer].sink_logits = args["sinks"]
        written = append(cache, layer, args["key"], args["value"], args["query"])
        plain = args["window"] is None and rest[1:] == (None, None)
        if self.site.hyper is not None and plain and args["query"].shape[2] > self.site.hyper.min_seq_len:
            return [*written, self._of_prompts.bind(cache, layer, args["query"], out, rest[0])]
        lists, picks = retrieve(cache, layer, args["query"], *rest[:2])
        return [*written, *lists, self._built.bind(cache, layer, args["query"], out, *rest, picks=picks)]

    def bind(self, args: Mapping[str, Any], out: Out) -> Run:
        raise TypeError("attention over a cache is bound by `attend`")


@dataclass(frozen=True)
class CacheReference:
    """`cached_attention` by the cache's own plain PyTorch meaning."""

    name: str = "torch.cached_attention"
    source: str = "reference of cached_attention"

    def contiguous(self, args: Mapping[str, Any]) -> tuple[str, ...]:
        return ()

    def attend(self, cache: Cache, args: Mapping[str, Any], out: torch.Tensor) -> list[Run]:
        """Calls that append and attend by the cache itself, and copy."""
        layer = int(args["layer"])
        options = (float(args["scale"]), args["window"], args["softcap"], args["sinks"])
        return [
            partial(cache.append, layer, args["key"], args["value"]),
            lambda: out.copy_(cache.attend(layer, args["query"], *options)),
        ]

    def bind(self, args: Mapping[str, Any], out: Out) -> Run:
        raise TypeError("attention over a cache is bound by `attend`")


@dataclass(frozen=True)
class RowOp:
    """A dialect op by a row-wise C++ kernel."""

    kernel: RowKernel

    @property
    def name(self) -> str:
        return self.kernel.name

    @property
    def source(self) -> str:
        return self.kernel.source

    def contiguous(self, args: Mapping[str, Any]) -> tuple[str, ...]:
        return self.kernel.contiguous(args)

    def bind(self, args: Mapping[str, Any], out: Out) -> Run:
        assert isinstance(out, torch.Tensor)
        return self.kernel.bind(args, out)


@dataclass(frozen=True)
class AtenOut:
    """An ATen op through its out-variant, which writes into a planned buffer."""

    overload: Any
    out_names: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"aten.{self.overload._schema.name.removeprefix('aten::')}.{self.overload._overloadname}"

    @property
    def source(self) -> str:
        return str(self.overload._schema)

    def contiguous(self, args: Mapping[str, Any]) -> tuple[str, ...]:
        return ()

    def bind(self, args: Mapping[str, Any], out: Out) -> Run:
        outs = out if isinstance(out, tuple) else (out,)
        return partial(self.overload, **args, **dict(zip(self.out_names, outs, strict=True)))


@dataclass(frozen=True)
class Reference:
    """An op by its plain PyTorch meaning and a copy: right, but it allocates, and weights are decoded on each call."""

    function: Callable[..., Any]
    label: str

    @property
    def name(self) -> str:
        return f"torch.{self.label}"

    @property
    def source(self) -> str:
        return f"reference of {self.label}"

    def contiguous(self, args: Mapping[str, Any]) -> tuple[str, ...]:
        return ()

    def bind(self, args: Mapping[str, Any], out: Out) -> Run:
        def run() -> None:
            fresh = {k: a.dense() if isinstance(a, Weight) else a for k, a in args.items()}
            results = self.function(**fresh)
            if isinstance(out, tuple):
                for buffer, result in zip(out, results, strict=True):
                    buffer.copy_(result)
            else:
                out.copy_(results)

        return run


def out_variant(overload: Any) -> AtenOut | None:
    """The out-variant of an ATen overload with the same arguments, or None."""
    wanted = [(a.name, str(a.type)) for a in overload._schema.arguments]
    packet = overload.overloadpacket
    for name in packet.overloads():
        candidate = getattr(packet, name)
        outs = [a.name for a in candidate._schema.arguments if a.is_out]
        ins = [(a.name, str(a.type)) for a in candidate._schema.arguments if not a.is_out]
        if outs and ins == wanted:
            return AtenOut(candidate, tuple(outs))
    return None
