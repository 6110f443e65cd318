"""Outlier channels that change nothing: gains and rows times a factor, the columns that read them divided by it."""

from __future__ import annotations

import torch

from smelt.ir.ops import GATED, RMS_NORM, arguments
from smelt.ir.program import Program
from smelt.ir.shapes import derive
from smelt.ir.weight import Weight
from smelt.passes.weights._follow import matrix, products


def planted(program: Program, factor: float = 30.0, count: int = 2, middle: bool = False) -> Program:
    """`count` random channels behind every norm of a llama, and of every MLP's middle, `factor` times as large."""
    derive(program)
    random = torch.Generator().manual_seed(0)

    def scale(name: str, dim: int, channels: torch.Tensor, by: float) -> None:
        value = program.weights[name].dense().movedim(dim, -1).clone()
        value[..., channels] *= by
        program.weights[name] = Weight.of(value.movedim(-1, dim).contiguous())

    for node in program.calls(RMS_NORM):
        readers = products(node)
        assert not isinstance(readers, str)
        gain = str(arguments(node)["weight"].target)
        channels = torch.randperm(program.weights[gain].shape[0], generator=random)[:count]
        scale(gain, -1, channels, factor)
        for name in {matrix(reader) for reader in readers}:
            scale(name, -1, channels, 1 / factor)
    for node in program.calls(GATED) if middle else ():
        (down,) = products(node)
        up = matrix(arguments(node)["up"])
        channels = torch.randperm(program.weights[up].shape[0], generator=random)[:count]
        scale(up, 0, channels, factor)
        scale(matrix(down), -1, channels, 1 / factor)
    return program
