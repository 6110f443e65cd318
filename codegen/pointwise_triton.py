"""Chains of pointwise ops as one Triton kernel: by themselves, or behind a product that has no place for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import fx

from .fuse import Region
from .plan import Run
from .pointwise import TRITON, label, outside, printed
from .product_triton import ACTIVATIONS, lines
from .regions_triton import Room
from .rows import row_stride
from .triton_module import load

BLOCK = 1024  # columns of a program
# functions of the ops, by the names that `pointwise.py` gives them
_FUNCTIONS = {
    **{act: value for act, value in ACTIVATIONS.items() if act},
    "sigmoid": "tl.sigmoid(v)",
    "tanh": "2 * tl.sigmoid(2 * v) - 1",
}


def source(nodes: Sequence[fx.Node], operands: Sequence[fx.Node]) -> str:
    """The kernel `pointwise` of a chain, a function of its operands in order."""
    names = {node: f"v{i}" for i, node in enumerate(operands)}
    body = [f"v{i} = tl.load(x{i} + row * x{i}_row + i, mask=inside, other=0)" for i in range(len(operands))]
    for number, node in enumerate(nodes):
        body.append(f"p{number} = {printed(node, names, TRITON)}")
        names[node] = f"p{number}"
    return _TEMPLATE.format(
        title=" → ".join(label(node) for node in nodes),
        acts="\n\n".join(_ACT.format(act=act, value=value) for act, value in _FUNCTIONS.items()),
        pointers=", ".join(f"x{i}" for i in range(len(operands))),
        steps=", ".join(f"x{i}_row" for i in range(len(operands))),
        body=lines(1, body),
        value=names[nodes[-1]],
    )


@cache
def _module(text: str) -> Any:
    return load(text, "pointwise")


def launch(text: str, operands: Sequence[tuple[torch.Tensor, int]], out: torch.Tensor) -> None:
    """Run a kernel of `source`: out [M, N] from operands, each with its step from row to row."""
    m, n = out.shape
    tensors, steps = [x for x, _ in operands], [step for _, step in operands]
    _module(text).pointwise[(m, -(-n // BLOCK))](*tensors, out, *steps, out.stride(0), n, BLOCK=BLOCK)


def bind(
    text: str, nodes: Sequence[fx.Node], room: Room, out: torch.Tensor, known: Mapping[fx.Node, torch.Tensor]
) -> Run:
    """A call that writes the contiguous `out`; `known`: operands whose values are not the graph's to ask for."""
    n, operands = out.shape[-1], []
    for node in nodes:
        x = known[node] if node in known else room.value(node)
        if x.dim() > 1 and row_stride(x) < 0:
            x = room.copy(x)
        operands.append((x, row_stride(x) if x.dim() > 1 else 0))
    return partial(launch, text, operands, out.view(-1, n))


@dataclass(frozen=True, eq=False)
class PointwiseKernel:
    """A chain of pointwise ops by itself."""

    region: Region

    @property
    def name(self) -> str:
        return ".".join(["triton.pointwise", *(label(node) for node in self.region.nodes)])

    @cached_property
    def source(self) -> str:
        return source(self.region.nodes, outside(self.region.nodes))

    def bind(self, room: Room) -> tuple[dict[fx.Node, torch.Tensor], list[Run]]:
        """The chain's last value, and the call that writes it."""
        operands = outside(self.region.nodes)
        full = [shape for shape in (room.value(node).shape for node in operands) if len(shape) > 1]
        out = room.take(*(full[0] if full else room.value(operands[0]).shape))
        return {self.region.at: out}, [bind(self.source, operands, room, out, {})]


_ACT = """\
@triton.jit
def {act}(v):
    return {value}
"""

_TEMPLATE = '''\
"""{title}, element by element"""

import triton
import triton.language as tl


{acts}

@triton.jit
def pointwise({pointers}, y, {steps}, y_row, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < N
{body}
    tl.store(y + row * y_row + i, {value}, mask=inside)
'''
