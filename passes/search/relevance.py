"""Bits for weights and activations where a model's answers come from (LRP-QViT, Ranjan and Savakis 2024)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...ir.encoding import Affine
from ...ir.errors import SmeltError
from ...ir.program import Program
from ...ir.shapes import derive
from ...ir.weight import Weight
from .._walk import Walk
from ..activations._static import Grid, within
from ..base import Calibration, Effect, Exactness, Outcome, Pass, Samples
from ..weights._matrices import all_dense
from ..weights._range import encode
from ._products import rounded, sites
from ._relevance import relevance


@dataclass(frozen=True)
class Relevance(Pass):
    """Gives matrix products that read the same tensor a width for their weights and what they read.

    (arXiv:2401.11243.) What the model answers is propagated back to the products; the more of it goes through one, the
    more bits it gets, so that relevance · 4^-bits, summed, is least.

    bits: the mean width, of the weights and of the activations that products read, each by itself.
    widths: those that there are.
    clip: share of the activations on the samples at each end that is left out of the range of their codes.

    Deviations: the paper makes the sum of relevance · bits largest, which gives products the least or the largest width
    and hardly any between. Softmax and attention's inner products are not rounded. Activations are rounded to values,
    not kept as codes: it is the weights that take fewer bytes.
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    effects: ClassVar[frozenset[Effect]] = frozenset({"numerics", "encodings"})

    bits: float = 4.0
    widths: tuple[int, ...] = (3, 4, 5, 6, 8)
    clip: float = 1e-4

    def __post_init__(self) -> None:
        if list(self.widths) != sorted(set(self.widths)) or not self.widths:
            raise SmeltError(f"widths are named once, from the smallest on, not {list(self.widths)}")
        for width in self.widths:
            Affine(width, 0)
        if self.bits < self.widths[0]:
            raise SmeltError(f"a mean of {self.bits:g} bits cannot be met: the least width is {self.widths[0]}")
        if not 0 <= self.clip < 0.5:
            raise SmeltError(f"clip is a share below 0.5, but is {self.clip}")

    @property
    def calibration(self) -> Calibration:
        """Whatever the model reads."""
        return "inputs"

    def requires(self, program: Program) -> Iterator[str]:
        """Dense matrices, and activations that are not rounded yet."""
        yield from all_dense(program, [name for each in sites(program, self.widths)[0] for name in each.names])
        if why := rounded(program):
            yield why

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Score, choose widths, and round weights and what they multiply."""
        if samples is None:
            raise SmeltError("search.relevance looks at what the model answers: give samples of its inputs")
        derive(program)
        found, skipped = sites(program, self.widths)
        through = relevance(program, samples)
        scores = [sum(through.get(node, 0.0) for node in site.nodes) for site in found]
        walk, ranges, reads = Walk(program, samples), [], []
        for at, site in enumerate(found):
            samples.progress(at, len(found), f"ranges of {site.names[0]}")
            values = [value for (value,) in walk.values(site.x)]
            reads.append(sum(value.numel() for value in values))
            ranges.append([within(value, self.clip) for value in values])
        counts = [sum(math.prod(program.weights[name].shape) for name in site.names) for site in found]
        chosen = allocate(scores, [_shares(counts), _shares(reads)], self.widths, self.bits)
        for site, width, spans in zip(found, chosen, ranges, strict=True):
            for name in site.names:
                encoding = Affine(width, 0)
                old = program.weights[name]
                program.weights[name] = Weight(old.shape, encoding, encode(old.dense(), encoding, "mse"))
                program.touch(name)
            grid = Grid.over(min(low for low, _ in spans), max(high for _, high in spans), width)
            grid.put(program, site.x, list(site.nodes))
        told = {
            site.names[0]: {"bits": width, "relevance": round(score, 4)}
            for site, width, score in zip(found, chosen, scores, strict=True)
        }
        done = tuple(name for site in found for name in site.names)
        mean = {
            "bits_per_weight": sum(program.weights[name].bits for name in done) / max(1, sum(counts)),
            "bits_per_activation": sum(n * width for n, width in zip(_shares(reads), chosen, strict=True)),
        }
        notes = {**{name: round(value, 4) for name, value in mean.items()}, "sites": told}
        return Outcome(done, skipped, notes if done else {})


def allocate(
    scores: Sequence[float], sizes: Sequence[Sequence[float]], widths: Sequence[int], bits: float
) -> list[int]:
    """A width for each site so that Σ score · 4^-width is small while each of `sizes` has a mean of at most `bits`.

    sizes: for each thing that is counted the share of every site, of sum 1. Raised one at a time where that gains most.
    """
    levels = [0] * len(scores)
    spent = [float(widths[0])] * len(sizes)
    while True:
        best, most = None, -1.0
        for i, level in enumerate(levels):
            if level + 1 == len(widths):
                continue
            more = [each[i] * (widths[level + 1] - widths[level]) for each in sizes]
            if any(now + add > bits + 1e-9 for now, add in zip(spent, more, strict=True)):
                continue
            gain = scores[i] * (4.0 ** -widths[level] - 4.0 ** -widths[level + 1]) / max(max(more), 1e-12)
            if gain > most:
                best, most, added = i, gain, more
        if best is None:
            return [widths[level] for level in levels]
        levels[best] += 1
        spent = [now + add for now, add in zip(spent, added, strict=True)]


def _shares(counts: Sequence[int]) -> list[float]:
    return [count / max(1, sum(counts)) for count in counts]
