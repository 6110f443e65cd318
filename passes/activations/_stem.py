"""The convolutions at the start of a net, run crop by crop: what windows share at the edges, each crop computes anew.

MCUNetV2: Memory-Efficient Patch-based Inference for Tiny Deep Learning (Lin et al., 2021, arXiv 2110.15352).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import fx

from ...ir.ops import arguments
from ...ir.program import Program
from ..weights._batch import CONVOLUTIONS
from ..weights.unfold import padding, pair

aten = torch.ops.aten
_EACH = {  # what computes each value from itself
    aten.relu.default, aten.silu.default, aten.gelu.default, aten.hardtanh.default, aten.sigmoid.default,
    aten.tanh.default,
}  # fmt: skip

Span = tuple[int, int]  # rows or columns of an image, the end not among them
Rounding = Callable[[fx.Node, int, int], fx.Node]  # of what a convolution reads, by numbers of convolution and crop


@dataclass(frozen=True)
class Crop:
    """One part of what the stem gives: `reads` rows and columns of the picture, `pads` of each convolution.

    Pads are rows above and below, columns left and right: those that the whole image has there.
    """

    reads: tuple[Span, Span]
    pads: tuple[tuple[Span, Span], ...]
    gives: tuple[Span, Span]
    macs: tuple[int, ...]  # multiplications of each convolution


@dataclass(frozen=True)
class Stem:
    """`nodes` lead from the pictures `x` [B, C, H, W] to the last of them, each the only reader of the one before."""

    x: fx.Node
    nodes: tuple[fx.Node, ...]

    @property
    def convolutions(self) -> list[fx.Node]:
        return [node for node in self.nodes if node.target in CONVOLUTIONS]

    def crops(self, grid: int) -> list[Crop]:
        """grid² parts of what the last node gives, row by row."""
        sizes = self.nodes[-1].meta["shape"][2:]
        edges = [[round(i * size / grid) for i in range(grid + 1)] for size in sizes]
        return [self._crop(parts) for parts in product(*(list(pairwise(each)) for each in edges))]

    def _crop(self, gives: tuple[Span, ...]) -> Crop:
        spans, pads, macs = list(gives), list[tuple[Span, Span]](), list[int]()
        for node in reversed(self.convolutions):
            a, window = arguments(node), arguments(node)["weight"].meta["shape"]
            macs.append(math.prod(window) * math.prod(end - start for start, end in spans))
            around = padding(node) or [0, 0]
            pad = []
            for axis, (start, end) in enumerate(spans):
                by, apart = pair(a["stride"])[axis], pair(a["dilation"])[axis]
                first = start * by - around[axis]
                last = (end - 1) * by - around[axis] + apart * (window[2 + axis] - 1) + 1
                spans[axis] = max(0, first), min(a["input"].meta["shape"][2 + axis], last)
                pad.append((spans[axis][0] - first, last - spans[axis][1]))
            pads.append((pad[0], pad[1]))
        return Crop((spans[0], spans[1]), tuple(pads[::-1]), (gives[0], gives[1]), tuple(macs[::-1]))


def stem(program: Program, convolutions: int) -> Stem | str:
    """The first so many convolutions and what is between and behind them, or why there are none.

    Needs derived shapes.
    """
    first = next(program.calls(*CONVOLUTIONS), None)
    if first is None:
        return f"{program.name} has no convolutions: this must come before weights.unfold"
    node, nodes, count = first, [first], 1
    while len(node.users) == 1:
        (node,) = node.users
        if node.target in CONVOLUTIONS and count < convolutions and node.args[0] is nodes[-1]:
            count += 1
        elif node.target not in _EACH:
            break
        nodes.append(node)
    if count < convolutions:
        return f"{convolutions} convolutions must follow one another, but {node.name} stands behind {count}"
    for each in nodes:
        if not all(isinstance(size, int) for size in each.meta["shape"][2:]):
            return f"images must have a fixed height and width, but {each.name} is {each.meta['shape']}"
        if each.target in CONVOLUTIONS and padding(each) is None:
            return f"{each.name} must pad both sides alike"
    return Stem(arguments(first)["input"], tuple(nodes))


def run_by_crops(program: Program, found: Stem, grid: int, rounded: Rounding = lambda value, *_: value) -> None:
    """Put the stem's crops in its place, joined again; `rounded` may change what a convolution of a crop reads."""
    last = found.nodes[-1]
    call = program.graph.call_function
    readers = list(last.users)
    with program.graph.inserting_after(last):
        marker = call(aten.alias.default, (last,))
    with program.graph.inserting_before(marker):
        parts = [_branch(program, found, crop, rounded, i) for i, crop in enumerate(found.crops(grid))]
        rows = [call(aten.cat.default, (parts[at : at + grid], 3)) for at in range(0, len(parts), grid)]
        joined = call(aten.cat.default, (rows, 2))
    for reader in readers:
        reader.replace_input_with(last, joined)
    program.graph.erase_node(marker)
    program.prune()


def _branch(program: Program, found: Stem, crop: Crop, rounded: Rounding, number: int) -> fx.Node:
    call = program.graph.call_function
    value = found.x
    for axis, (start, end) in enumerate(crop.reads):
        value = call(aten.slice.Tensor, (value, 2 + axis, start, end))
    at = 0
    for node in found.nodes:
        if node.target not in CONVOLUTIONS:
            value = call(node.target, (value, *node.args[1:]), node.kwargs)  # type: ignore[arg-type]  # an overload
            continue
        a, (rows, columns) = arguments(node), crop.pads[at]
        value = rounded(value, at, number)
        if any((*rows, *columns)):
            value = call(aten.constant_pad_nd.default, (value, [*columns, *rows]))
        shape = (pair(a["stride"]), [0, 0], pair(a["dilation"]), a["groups"])
        value = call(aten.conv2d.default, (value, a["weight"], a["bias"], *shape))
        at += 1
    return value
