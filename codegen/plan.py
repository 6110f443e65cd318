"""The plan: which kernel runs each node of a Program on a target, and why. The runtime only binds and calls it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import torch

from ..ir.cache import Cache
from ..ir.program import Program
from .fuse import Region

Target = Literal["cpp", "torch", "triton"]
Out: TypeAlias = torch.Tensor | tuple[torch.Tensor, ...]
Run: TypeAlias = Callable[[], Any]  # a `Call` of a generated function, or any Python call


class Kernel(Protocol):
    """A way to compute one node; `bind` fixes all addresses and returns a call without arguments."""

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> str:
        """The generated source, or the name of the library call."""
        ...

    def contiguous(self, args: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of tensor arguments that must be copied to be contiguous first."""
        ...

    def bind(self, args: Mapping[str, Any], out: Out) -> Run:
        """A call that writes `out`, contiguous and of the node's shape, from `args` by the op's argument names."""
        ...


class Attention(Kernel, Protocol):
    """A kernel of `cached_attention`, which is bound to a cache as well."""

    def attend(self, cache: Cache, args: Mapping[str, Any], out: torch.Tensor) -> list[Run]:
        """Calls that append to the layer of the cache that `args["layer"]` names, and attend over it."""
        ...


@dataclass(frozen=True)
class Choice:
    """The kernel of one node and the reason; `fallback`: the target has no fast kernel for what the node stores."""

    kernel: Kernel
    why: str
    fallback: bool = False


@dataclass(frozen=True)
class Plan:
    """A lowered Program. Nodes without a choice or region are views, sizes, inputs and weights: they cost nothing.

    `encoded[node]` names the arguments that a node's kernel takes as stored weights, not as decoded tensors.
    """

    program: Program
    target: Target
    choices: Mapping[str, Choice]
    encoded: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    regions: tuple[tuple[Region, Any], ...] = ()  # each with its kernel
    device: torch.device = torch.device("cpu")  # noqa: RUF009  # a device never changes
    draft: Plan | None = None  # of the program's draft model
    stages: tuple[Plan, ...] = ()  # of the program's depth plan, over the same cache and packed weights
    capacity: Mapping[str, str] = field(default_factory=dict)  # nodes that save memory but no time, and why

    def kernels(self) -> list[dict[str, Any]]:
        """One row a node: node, kernel, why, fallback, role, source; for `lm.kernels` and `smelt inspect`.

        role: `capacity` where what is stored saves memory but no time, else `fast`.
        """
        rows: dict[str, dict[str, Any]] = {
            name: {
                "node": name,
                "kernel": c.kernel.name,
                "why": c.why,
                "fallback": c.fallback,
                "source": c.kernel.source,
            }
            for name, c in self.choices.items()
        }
        for region, kernel in self.regions:
            shared = {"kernel": kernel.name, "why": str(region), "fallback": False, "source": kernel.source}
            rows |= {node.name: {"node": node.name, **shared} for node in region.nodes}
        for name, row in rows.items():
            row["role"] = "capacity" if name in self.capacity or row["fallback"] else "fast"
            if name in self.capacity:
                row["why"] += f"; {self.capacity[name]}"
        return [rows[node.name] for node in self.program.graph.nodes if node.name in rows]
