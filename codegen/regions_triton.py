"""Regions of target triton: those of `fuse`, and what stands before them that their kernels compute as well.

A norm joins the products that alone read it. Rotary of query and key joins the attention that reads them, which appends
the key to the cache in the same launch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import fx

from ..ir.cache import Cache
from ..ir.ops import RMS_NORM, ROTARY, arguments, is_op
from .fuse import Chain, Region
from .plan import Run


@dataclass(frozen=True)
class Fused(Region):
    """A region with the nodes `before` it that its kernel computes too."""

    before: tuple[fx.Node, ...] = ()

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All members."""
        return (*self.before, *(node for chain in self.chains for node in chain.nodes))

    def __str__(self) -> str:
        """A line of the dump."""
        line = super().__str__()
        return f"{line}; with {', '.join(node.name for node in self.before)}" if self.before else line


class Room(Protocol):
    """What a binding gives the kernel of a region: operands, and buffers on the device."""

    cache: Cache | None

    def value(self, node: fx.Node) -> torch.Tensor:
        """An operand as it lies; a weight of the graph's own is decoded."""
        ...

    def copy(self, x: torch.Tensor) -> torch.Tensor:
        """A contiguous copy, made anew on every step before the kernel runs."""
        ...

    def take(self, *shape: int) -> torch.Tensor:
        """A float32 buffer for a result."""
        ...

    def spare(self, *shape: int) -> torch.Tensor:
        """A float32 buffer for as long as the kernel runs."""
        ...


class RegionKernel(Protocol):
    """A way to compute a region."""

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> str:
        """The generated source."""
        ...

    def bind(self, room: Room) -> tuple[Mapping[fx.Node, torch.Tensor], list[Run]]:
        """The region's outputs, and calls that write them on every step."""
        ...


def with_norm(region: Region) -> Fused:
    """A region of products, with the norm of its input where nobody else reads it."""
    make = partial(Fused, region.kind, region.chains, region.at, region.width, region.notes, region.saved)
    x = arguments(region.chains[0].products[0])["x"]
    if is_op(x, RMS_NORM) and all(user in region.nodes for user in x.users) and _is_float(x):
        return make((x,))
    return make(())


def attention(node: fx.Node) -> Fused:
    """The region of a cached attention, with the rotary of its query and key where nobody else reads them."""
    args = arguments(node)
    turned = [args["query"], args["key"]]
    alike = all(is_op(each, ROTARY) and list(each.users) == [node] and _is_float(each) for each in turned)
    if alike:
        first, second = map(arguments, turned)
        alike = all(first[name] == second[name] for name in ("positions", "inv_freq", "scale"))
    return Fused("attention", (Chain((), (node,)),), node, before=tuple(turned) if alike else ())


def rows(room: Room, x: torch.Tensor) -> torch.Tensor:
    """x [..., K] as [M, K], copied where its rows do not lie evenly."""
    flat = x.reshape(-1, x.shape[-1]) if x.stride(-1) == 1 else None
    if (
        flat is None
        or flat.data_ptr() != x.data_ptr()
        or flat.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    ):
        return room.copy(x).view(-1, x.shape[-1])
    return flat


def _is_float(node: fx.Node) -> bool:
    return node.meta.get("dtype", torch.float32) is torch.float32
