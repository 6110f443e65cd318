"""Kernels behind one interface: generated C++, out-variants of ATen ops, and the reference as the last resort."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from ..ir.cache import Cache, Site
from ..ir.weight import Weight
from . import attention, gemv
from .plan import BULK, Out, Run
from .rows import RowKernel


@dataclass(frozen=True)
class LinearKernel:
    """`linear` by the generated GEMV: every row in one order, so that T = 1 and a tree agree to the bit."""

    weight: Weight

    @property
    def name(self) -> str:
        return gemv.name(self.weight.encoding)

    @property
    def source(self) -> str:
        return gemv.source(self.weight.encoding)

    @cached_property
    def _bound(self) -> gemv.Bound:
        parts = {name: part.contiguous() for name, part in self.weight.parts.items()}
        return gemv.Gemv(self.weight.encoding).bind(parts, self.weight.shape)

    def contiguous(self, args: Mapping[str, Any]) -> tuple[str, ...]:
        return () if args["x"].is_contiguous() else ("x",)

    def bind(self, args: Mapping[str, Any], out: Out) -> Run:
        assert isinstance(out, torch.Tensor)
        n, k = self.weight.shape
        return partial(self._bound, args["x"].view(-1, k), out.view(-1, n), args.get("bias"))


@dataclass(frozen=True)
class DecodedLinear:
    """`linear` over many rows by decoding the weight and a library product; over few rows as `few` does it."""

    few: LinearKernel
    name: str = "torch.mm"
    source: str = "torch.mm of a decoded weight"

    def contiguous(self, args: Mapping[str, Any]) -> tuple[str, ...]:
        return self.few.contiguous(args)

    def bind(self, args: Mapping[str, Any], out: Out) -> Run:
        assert isinstance(out, torch.Tensor)
        weight = self.few.weight
        n, k = weight.shape
        x, y = args["x"].view(-1, k), out.view(-1, n)
        if x.shape[0] < BULK:
            return self.few.bind(args, out)

        def run() -> None:
            torch.mm(x, weight.dense().t(), out=y)
            if args.get("bias") is not None:
                y.add_(args["bias"])

        return run


@dataclass(frozen=True)
class AttentionKernel:
    """`cached_attention` over the segments of one kind of site; layers with equal sites share the built kernel."""

    site: Site

    @property
    def name(self) -> str:
        stored = "dense" if self.site.keys is None and self.site.values is None else "segments"
        return f"attention.{stored}.{self.site.heads}x{self.site.kv_heads}x{self.site.key_dim}"

    @property
    def source(self) -> str:
        return attention.source(self.site)

    @cached_property
    def _built(self) -> attention.SegmentAttention:
        return attention.SegmentAttention(self.site)

    def contiguous(self, args: Mapping[str, Any]) -> tuple[str, ...]:
        return () if args["query"].stride(-1) == 1 else ("query",)

    def attend(self, cache: Cache, args: Mapping[str, Any], out: torch.Tensor) -> Run:
        """A call over the cache that `args["layer"]` names; `out` [B, H, T, E] may have any strides."""
        bound = self._built.bind(cache, int(args["layer"]))
        return partial(bound, args["query"], out, float(args["scale"]), args["softcap"], args["sinks"])

    def bind(self, args: Mapping[str, Any], out: Out) -> Run:
        raise TypeError("attention over a cache is bound by `attend`")


@dataclass(frozen=True)
class CacheReference:
    """`cached_attention` by the cache's own plain PyTorch meaning."""

    name: str = "torch.cached_attention"
    source: str = "reference of cached_attention"

    def contiguous(self, args: Mapping[str, Any]) -> tuple[str, ...]:
        return ()

    def attend(self, cache: Cache, args: Mapping[str, Any], out: torch.Tensor) -> Run:
        """A call that attends by `Cache.attend` and copies."""
        options = (float(args["scale"]), args["window"], args["softcap"], args["sinks"])
        return lambda: out.copy_(cache.attend(int(args["layer"]), args["query"], *options))

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
