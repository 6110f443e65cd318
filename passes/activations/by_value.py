"""Bits of activations by what crops of a picture hold (QuantMCU, Tao et al., 2024, arXiv 2401.13714)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ...ir.errors import SmeltError
from ...ir.ops import arguments
from ...ir.program import Program
from ...ir.shapes import derive
from .._walk import Walk
from ..base import Calibration, Effect, Outcome, Pass, Samples
from ._static import Grid, entropy
from ._stem import Rounding, Stem, run_by_crops, stem
from .crops import croppable, told

aten = torch.ops.aten
MOST, WEIGHT = 8, 8  # bits of activations in crops with outliers, and of weights where operations are counted
CLIPS = [i / 20 for i in range(20, 3, -1)]  # shares of the largest value that codes may end at


@dataclass(frozen=True)
class ByValue(Pass):
    """Runs the first convolutions by crops as `activations.crops` does, and rounds what they read, crop by crop.

    A crop with a value far from the mean of pictures has 8 bits throughout, found anew for each picture. All others
    have bits of their own in each feature map: those of the best score -λ · entropy lost + (1 - λ) · bit operations
    saved; then, until a budget is met, the map goes down that has the best score there. Bits below 8 are simulated:
    values are rounded and the operations counted, no kernel is faster.

    grid, convolutions: as of `activations.crops`.
    widths: bits to choose from.
    quantile: of a normal distribution with the mean and deviation of the samples; values beyond it are outliers. 1:
        none are.
    weight: λ.
    budget: bit operations of a crop without outliers, as a share of those with 8 bits.
    """

    effects: ClassVar[frozenset[Effect]] = frozenset({"numerics"})

    grid: int = 2
    convolutions: int = 3
    widths: tuple[int, ...] = (8, 4, 2)
    quantile: float = 0.999
    weight: float = 0.5
    budget: float = 0.5

    def __post_init__(self) -> None:
        if not self.widths or not all(1 < bits <= MOST for bits in self.widths):
            raise SmeltError(f"widths are bits from 2 to {MOST}, but are {list(self.widths)}")
        if not 0.5 < self.quantile <= 1 or not 0 <= self.weight <= 1 or not 0 < self.budget <= 1:
            raise SmeltError("quantile lies above 0.5, and weight and budget are shares: none may exceed 1")
        if self.budget * MOST < min(self.widths):
            raise SmeltError(f"a budget of {self.budget:g} needs {self.budget * MOST:g} bits: add such a width")

    @property
    def calibration(self) -> Calibration:
        return "inputs"

    def requires(self, program: Program) -> Iterator[str]:
        """Convolutions that follow one another."""
        yield from croppable(program, self.convolutions, self.grid)

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Choose bits on the samples, then run by crops."""
        found = stem(program, self.convolutions)
        assert isinstance(found, Stem)
        if samples is None:
            raise SmeltError("activations.by_value looks at values of sample pictures: pass calibration inputs")
        reads = [arguments(node)["input"] for node in found.convolutions]
        pieces = list(Walk(program, samples).values(*dict.fromkeys(reads)))
        maps = [torch.cat([piece[i] for piece in pieces]) for i in range(len(reads))]
        crops = found.crops(self.grid)
        macs = [sum(each) for each in zip(*(crop.macs for crop in crops), strict=True)]
        bits = self._bits(maps, [each / sum(macs) for each in macs])
        mean, deviation = maps[0].mean().item(), maps[0].std().item()
        far = deviation * torch.special.ndtri(torch.tensor((1 + self.quantile) / 2)).item()  # infinite at 1
        distance = (maps[0] - mean).abs()
        held = [(distance[:, :, slice(*rows), slice(*columns)] > far).flatten(1).any(1) for rows, columns in
                (crop.reads for crop in crops)]  # fmt: skip
        outlying = float(torch.stack(held).float().mean())
        low = sum(b * m for b, m in zip(bits, macs, strict=True)) / sum(macs)
        mixed = outlying * MOST + (1 - outlying) * low
        notes: dict[str, Any] = {
            "bits": bits,
            "outlying_crops": round(outlying, 4),
            "bits_per_activation": round(mixed, 4),
            "bit_operations": round(WEIGHT * sum(macs) * mixed),
            "multiplications": told(found, self.grid),
        }
        few = [fitted(each, width) for each, width in zip(maps, bits, strict=True)]
        rounding = _rounding(program, few, [fitted(each, MOST) for each in maps], mean, far)
        done = tuple(node.name for node in found.convolutions)
        run_by_crops(program, found, self.grid, rounding)
        program.touch("activations")
        derive(program)
        return Outcome(done, {}, notes)

    def _bits(self, maps: list[torch.Tensor], shares: list[float]) -> list[int]:
        """Bits of each feature map whose readers do these shares of the multiplications."""
        told = [{bits: entropy(fitted(each, bits).codes(each)) for bits in {*self.widths, MOST}} for each in maps]

        def score(i: int, bits: int) -> float:
            lost = 1 - told[i][bits] / max(told[i][MOST], 1e-12)
            return -self.weight * lost + (1 - self.weight) * shares[i] * (1 - bits / MOST)

        chosen = [max(self.widths, key=lambda bits: score(i, bits)) for i in range(len(maps))]
        while sum(b * share for b, share in zip(chosen, shares, strict=True)) > self.budget * MOST + 1e-9:
            lower = {i: [b for b in self.widths if b < bits] for i, bits in enumerate(chosen)}
            steps = [(i, max(options)) for i, options in lower.items() if options]
            i, bits = max(steps, key=lambda step: score(*step))
            chosen[i] = bits
        return chosen


def _rounding(program: Program, few: list[Grid], many: list[Grid], mean: float, far: float) -> Rounding:
    """Rounds what each convolution reads to `few` values, or `many` in crops with values so far from the mean."""
    call, outlying = program.graph.call_function, dict[int, fx.Node]()

    def rounded(value: fx.Node, at: int, crop: int) -> fx.Node:
        if at == 0 and far < math.inf:
            distance = call(aten.abs.default, (call(aten.sub.Tensor, (value, mean)),))
            furthest = call(aten.amax.default, (distance, [1, 2, 3], True))
            outlying[crop] = call(aten.gt.Scalar, (furthest, far))
        _, plain = few[at].rounded(program.graph, value)
        if crop not in outlying or few[at] == many[at]:
            return plain
        return call(aten.where.self, (outlying[crop], many[at].rounded(program.graph, value)[1], plain))

    return rounded


def fitted(values: torch.Tensor, bits: int) -> Grid:
    """The values of so many bits that round with the least squared error, of some that end before the largest."""
    low, high = values.min().item(), values.max().item()
    options = [Grid.over(low * clip, high * clip, bits) for clip in CLIPS]
    return min(options, key=lambda each: float((each.round(values) - values).square().mean()))
