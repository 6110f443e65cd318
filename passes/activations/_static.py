"""Activations rounded to a range that was fixed beforehand: an even grid of 2^bits values, 0 among them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ...ir.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class Grid:
    """The values from `low` to `high` that are multiples of `step`."""

    low: float
    high: float
    step: float

    @classmethod
    def over(cls, low: float, high: float, bits: int) -> Grid:
        """2^bits values over a range, which is widened to hold 0."""
        low, high = min(low, 0.0), max(high, 0.0)
        step = max(high - low, 1e-12) / (2**bits - 1)
        first = round(low / step)
        return cls(first * step, (first + 2**bits - 1) * step, step)

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """The nearest of the values, like x."""
        return (x.clamp(self.low, self.high) * (1 / self.step)).round() * self.step

    def codes(self, x: torch.Tensor) -> torch.Tensor:
        """Of each activation the number of its value, int64 from 0 on, like x."""
        return ((x.clamp(self.low, self.high) - self.low) / self.step).round().long()

    def put(self, program: Program, x: fx.Node, readers: list[fx.Node]) -> fx.Node:
        """Let `readers` of x, in any order, read its rounded values instead: the first node of these."""
        first = next(node for node in program.graph.nodes if node in readers)
        with program.graph.inserting_before(first):
            clipped, values = self.rounded(program.graph, x)
        for reader in readers:
            reader.replace_input_with(x, values)
        program.touch("activations")
        return clipped

    def rounded(self, graph: fx.Graph, x: fx.Node) -> tuple[fx.Node, fx.Node]:
        """`round` in a graph: its first node, and its last."""
        clipped = graph.call_function(aten.clamp.default, (x, self.low, self.high))
        counted = graph.call_function(aten.mul.Tensor, (clipped, 1 / self.step))
        nearest = graph.call_function(aten.round.default, (counted,))
        return clipped, graph.call_function(aten.mul.Tensor, (nearest, self.step))

    def move(self, clipped: fx.Node) -> None:
        """Give what `put` has put there this grid instead."""
        counted = next(iter(clipped.users))
        values = next(iter(next(iter(counted.users)).users))
        clipped.args = (clipped.args[0], self.low, self.high)
        counted.args, values.args = (counted.args[0], 1 / self.step), (values.args[0], self.step)


def entropy(codes: torch.Tensor) -> float:
    """Of how often each code stands there, in bits."""
    shares = torch.bincount(codes.flatten()).double() / codes.numel()
    shares = shares[shares > 0]
    return float(-(shares * shares.log2()).sum())


def within(x: torch.Tensor, clip: float) -> tuple[float, float]:
    """The range of activations without a share `clip` of them at each end."""
    ordered = x.flatten().float().sort().values
    at = int(clip * (len(ordered) - 1))
    return float(ordered[at]), float(ordered[-1 - at])
