"""Weight-only integers with a granularity found per matrix (FineQuant, Kim et al. 2023, arXiv:2308.09723)."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from ...ir.encoding import NM, Affine
from ...ir.encoding.packing import LANES
from ...ir.errors import SmeltError
from ...ir.program import Program
from ...ir.weight import Weight
from ..base import Effect, Exactness, Outcome, Pass, Samples
from ..measure import sqnr
from ._matrices import Matrix, all_dense, matrices, stored_in
from ._range import Range, check, encode


@dataclass(frozen=True)
class Quantize(Pass):
    """Stores weight matrices as integer codes, with scales that are shared by groups as fine as each matrix needs.

    Only the weights are looked at. The search starts with one scale a row and halves the group where that shrinks the
    mean range of a group enough: R(g / 2) / R(g) < alpha. For Gaussian rows the ratio is 0.93 to 0.96, with a 10 sigma
    outlier in 4096 it is 0.7.

    bits: width of a code.
    alpha: a halving is taken if it leaves less than this share of the mean range.
    smallest: no group is smaller than this.
    group: one group for every matrix instead of the search; 0 is the whole row.
    head: width of the vocabulary matrices, which are the head and every lookup table. `same` takes `bits`, `keep`
        leaves them as they are. A table that is tied to the head is one matrix and counts once.
    scale: type in which scales are stored.
    zero: whether groups have a zero of their own; without, codes are symmetric.
    range: how a group's scale is found: from its largest weight, where the error is least (`mse`, to the power 2.4),
        with the zero of Half-Quadratic Quantization (`hqq`, Badri and Shaji, 2023), or for 2 bits without a zero, which
        are ternary, as the `mean` or the `median` magnitude (BitNet b1.58, Ma et al., 2024).

    Deviations: the paper names a heuristic on ranges; the mean over groups is our reading of it. A halving that does
    not pay does not end the search, because two outliers in a row are only parted further down: later ones are held to
    alpha for every halving since the last that did. Experts of one layer share a granularity.
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    effects: ClassVar[frozenset[Effect]] = frozenset({"numerics", "encodings"})

    bits: Literal[2, 3, 4, 8] = 4
    alpha: float = 0.85
    smallest: int = 64
    group: int | None = None
    head: Literal["keep", 8, "same"] = 8
    scale: Literal["float16", "bfloat16", "float32"] = "float16"
    zero: bool = False
    range: Range = "absmax"

    def __post_init__(self) -> None:
        """Refuses options that no matrix can satisfy."""
        if not 0 < self.alpha <= 1:
            raise SmeltError(f"alpha is a share above 0 and at most 1, but is {self.alpha}")
        if self.smallest < 1:
            raise SmeltError(f"smallest is a count of weights, but is {self.smallest}")
        if self.group is not None and self.group < 0:
            raise SmeltError(f"group is a count of weights (0: the whole row), but is {self.group}")
        check(self.range, self.bits, self.zero)

    def requires(self, program: Program) -> Iterator[str]:
        """Every matrix that would be encoded must still be dense, or what N:M sparsity keeps of it."""
        names = [name for name, width in self._widths(program).items() if isinstance(width, int)]
        yield from all_dense(program, names, sparse=True)

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Encode one matrix at a time; no two are decoded at once."""
        widths = self._widths(program)
        skipped = {name: why for name, why in widths.items() if isinstance(why, str)}
        groups: Counter[str] = Counter()
        noise: dict[str, float] = {}
        before = after = bits = count = 0
        for name, width in widths.items():
            if isinstance(width, str):
                continue
            old = program.weights[name]
            new, noise[name], group = self._encoded(name, old, width)
            program.weights[name] = new
            program.touch(name)
            groups[str(group or "row")] += 1
            before, after = before + old.nbytes, after + new.nbytes
            bits, count = bits + new.bits, count + math.prod(new.shape)
        if not noise:
            return Outcome((), skipped)
        worst = min(noise, key=noise.__getitem__)
        notes: dict[str, Any] = {
            "bits_per_weight": round(bits / count, 4),
            "groups": dict(sorted(groups.items())),
            "sqnr_db": {"min": round(noise[worst], 2), "median": round(statistics.median(noise.values()), 2)},
            "worst": worst,
            "bytes": {"before": before, "after": after},
        }
        return Outcome(tuple(noise), skipped, notes)

    def _encoded(self, name: str, weight: Weight, width: int) -> tuple[Weight, float, int]:
        """The encoded weight, its signal to noise ratio in dB, and the group."""
        dense = weight.dense()
        if not bool(dense.isfinite().all()):
            raise SmeltError(f"{name}: has NaN or infinite values, which no integer stands for")
        sparse = weight.encoding if isinstance(weight.encoding, NM) else None
        columns = sparse.columns(weight.parts, weight.shape) if sparse else None
        values = dense if columns is None else dense.gather(-1, columns)
        if self.group is None:
            block = math.lcm(Affine(width, 0).block, LANES)
            group = granularity(values, block, self.smallest, self.alpha)
        else:
            group = self.group * values.shape[-1] // dense.shape[-1]
        encoding = Affine(width, group, zero=self.zero, scale=self.scale)
        try:
            parts = encode(values, encoding, self.range)
            encoded = Weight(weight.shape, encoding, parts)
            if sparse and columns is not None:
                encoded = Weight(weight.shape, replace(sparse, values=encoding), sparse.parts(columns, parts))
        except SmeltError as error:
            raise SmeltError(f"{name}: {error}") from error
        ratio = min(sqnr(dense, encoded.dense()), 999.0)  # a matrix of zeros has no noise, and JSON no infinity
        return encoded, ratio, group

    def _widths(self, program: Program) -> dict[str, int | str]:
        """For each weight the width of its codes, or why it stays as it is."""
        found = matrices(program)
        return {
            name: matrix if isinstance(matrix, str) else self._width(program.weights[name], matrix)
            for name, matrix in found.items()
        }

    def _width(self, weight: Weight, matrix: Matrix) -> int | str:
        if matrix.vocabulary and self.head == "keep":
            return "a vocabulary matrix, and head is keep"
        width = 8 if matrix.vocabulary and self.head == 8 else self.bits
        least = self.smallest if self.group is None else self.group
        if weight.shape[-1] < least:
            return f"its rows of {weight.shape[-1]} are shorter than a group of {least}"
        found = stored_in(weight, Affine(width, self.group or 0, zero=self.zero, scale=self.scale))
        return found if isinstance(found, str) else width


def granularity(weight: torch.Tensor, block: int, smallest: int, alpha: float) -> int:
    """The group for `weight [..., N, K]`, 0 for the whole row.

    Groups divide K, are multiples of `block` and at least `smallest`; each that is tried is at most half of the last.
    """
    row = tried = group = weight.shape[-1]
    spread = _mean_range(weight, row)
    while finer := [g for g in range(tried // 2, smallest - 1, -1) if row % g == 0 and g % block == 0]:
        tried = finer[0]
        if (found := _mean_range(weight, tried)) < spread * alpha ** math.log2(group / tried):
            group, spread = tried, found
    return 0 if group == row else group


def _mean_range(weight: torch.Tensor, group: int) -> float:
    groups = weight.unflatten(-1, (weight.shape[-1] // group, group))
    return float((groups.amax(-1) - groups.amin(-1)).double().mean())
