"""The plan: which kernel runs each node of a Program on a target, and why. The runtime only binds and calls it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import torch

from ..ir.cache import Cache
from ..ir.program import Program

Target = Literal["cpp", "torch"]
Out: TypeAlias = torch.Tensor | tuple[torch.Tensor, ...]
Run: TypeAlias = Callable[[], Any]
BULK = 128  # rows from which decoding a weight once and a library product beat a GEMV that decodes it for every four


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

    def attend(self, cache: Cache, args: Mapping[str, Any], out: torch.Tensor) -> Run:
        """A call that attends over the layer of the cache that `args["layer"]` names."""
        ...


@dataclass(frozen=True)
class Choice:
    """The kernel of one node and the reason; `fallback`: the target has no fast kernel for what the node stores.

    `bulk`: a kernel that is faster over many rows, whose last bits may be others than those of `kernel`. Prompts and
    plain modules use it; steps do not, because a token must get the same logits alone and as a node of a draft tree.
    """

    kernel: Kernel
    why: str
    fallback: bool = False
    bulk: Kernel | None = None


@dataclass(frozen=True)
class Plan:
    """A lowered Program. Nodes without a choice are views, sizes, inputs and weights: they cost nothing in a step.

    `encoded[node]` names the arguments that a node's kernel takes as stored weights, not as decoded tensors.
    """

    program: Program
    target: Target
    choices: Mapping[str, Choice]
    encoded: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def kernels(self) -> list[dict[str, Any]]:
        """One row a node: node, kernel, why, fallback; for `lm.kernels` and `smelt inspect`."""
        return [
            {"node": node, "kernel": c.kernel.name, "why": c.why, "fallback": c.fallback}
            for node, c in self.choices.items()
        ]
