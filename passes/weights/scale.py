"""Moves a factor of each channel from its maker into the columns that read it, or back (AWQ, SmoothQuant, RepQ-ViT)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from ...ir.encoding import Affine
from ...ir.errors import SmeltError
from ...ir.program import Program
from ...ir.shapes import derive
from .._walk import Walk
from ..base import Calibration, Effect, Exactness, Outcome, Pass, Samples
from ._edges import Edge, Kind, edges
from ._follow import matrix, wide
from ._moments import moments

GRID = 20  # exponents from 0 on that AWQ tries


@dataclass(frozen=True)
class Scale(Pass):
    """Divides what makes a channel by s and multiplies the columns that read it by s, before either is rounded.

    rule: `smoothquant` (Xiao et al. 2022, arXiv:2211.10438) shares outliers of activations between them and the
        weights: s = max|x|^alpha / max|w|^(1 - alpha). `awq` (Lin et al. 2023, arXiv:2306.00978) makes columns large
        where activations are: s = |x|^a, with the exponent a in [0, 1) at which rounded weights change the products
        that read the channels least. `even` (RepQ-ViT, Li et al. 2022, arXiv:2212.08254) centres the channels of a
        norm with a bias and gives them one range, so that one grid serves them all; on the samples the share `clip` at
        each end is left out of it, as in LRP-QViT (arXiv:2401.11243).
    which: the channels of `norm`: from gain to products; `values`: from the rows of values to attention's output
        product; `down`: from the rows of an MLP's second factor to its last product.
    alpha: of smoothquant.
    clip: of even.
    bits, group, zero: how awq expects weights to be rounded: as weights.quantize names it.

    Deviations: awq takes the root mean square of a channel for its mean magnitude, because the second moments that give
    the error have it already. The search for clipped ranges is `weights.quantize` with `range: mse`. Channels of a
    vocabulary head are not scaled. Products are computed in float64 and stored in float32.
    """

    exactness: ClassVar[Exactness] = Exactness.EXACT
    effects: ClassVar[frozenset[Effect]] = frozenset({"encodings"})

    rule: Literal["smoothquant", "awq", "even"] = "awq"
    which: tuple[Kind, ...] = ("norm", "values", "down")
    alpha: float = 0.5
    clip: float = 1e-3
    bits: Literal[2, 3, 4, 8] = 4
    group: int = 128
    zero: bool = False

    def __post_init__(self) -> None:
        """Refuses options that ask for nothing, or for no share."""
        if not self.which:
            raise SmeltError("which is empty: name norm, values or down")
        if not 0 <= self.alpha <= 1:
            raise SmeltError(f"alpha is a share from 0 to 1, but is {self.alpha}")
        if not 0 <= self.clip < 0.5:
            raise SmeltError(f"clip is a share below 0.5, but is {self.clip}")
        if self.group < 0:
            raise SmeltError(f"group is a count of weights (0: the whole row), but is {self.group}")

    @property
    def calibration(self) -> Calibration:
        """Channels are measured on text."""
        return "inputs"

    def requires(self, program: Program) -> Iterator[str]:
        """No cache yet: what it stores would change. No turned stream: its channels have no scales of their own."""
        if program.cache is not None and "values" in self.which:
            yield f"weights.scale must come before the cache is inserted{program.changed_by('cache')}"
        if program.facts.get("rotated"):
            yield "weights.scale must come before weights.rotate, which spreads what it looks for"

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Scale the channels of one edge after the other."""
        if samples is None:
            raise SmeltError("weights.scale measures channels on text: give calibration texts")
        derive(program)
        found, skipped = edges(program, self.which)
        walk, sites = Walk(program, samples), dict[str, dict[str, Any]]()
        for at, edge in enumerate(found):
            samples.progress(at, len(found), edge.name)
            rules = {"smoothquant": self._smooth, "awq": self._aware, "even": self._even}
            by, note = rules[self.rule](program, edge, walk)
            if isinstance(note, str):
                skipped[edge.name] = note
            else:
                edge.scale(program, by)
                sites[edge.name] = note
        return Outcome(tuple(sites), skipped, {"sites": sites} if sites else {})

    def _smooth(self, program: Program, edge: Edge, walk: Walk) -> tuple[torch.Tensor, dict[str, Any] | str]:
        """s by channel from the largest magnitudes on both sides."""
        most = torch.stack([value.reshape(-1, value.shape[-1]).abs().amax(0) for (value,) in walk.values(edge.x)])
        inputs = _by_channel(edge, most.amax(0).double(), "amax")
        weights = _by_channel(edge, _stacked(program, edge).abs().amax(0), "amax")
        there = (inputs > 0) & (weights > 0)
        by = torch.where(there, inputs.clamp_min(1e-5) ** self.alpha / weights.clamp_min(1e-5) ** (1 - self.alpha), 1.0)
        return by, {"spread": float(f"{by.max() / by.min():.3g}")}

    def _even(self, program: Program, edge: Edge, walk: Walk) -> tuple[torch.Tensor, dict[str, Any] | str]:
        """s by channel that leaves all of them the mean range, once they are centred where that can be done."""
        values = torch.cat([value.reshape(-1, value.shape[-1]) for (value,) in walk.values(edge.x)]).double()
        ordered = values.sort(0).values
        at = int(self.clip * (len(ordered) - 1))
        high, low = (_by_channel(edge, end, "amax") for end in (ordered[-1 - at], -ordered[at]))
        why = edge.centre(program, (high - low) / 2)
        size = (high + low) / 2 if why is None else torch.maximum(high, low)
        size = size.clamp_min(float(size.max()) * 1e-4) if float(size.max()) else torch.ones_like(size)
        note = {"spread": float(f"{size.max() / size.min():.3g}")}
        return size / size.mean(), {**note, **({} if why is None else {"not centred": why})}

    def _aware(self, program: Program, edge: Edge, walk: Walk) -> tuple[torch.Tensor, dict[str, Any] | str]:
        """s by channel with the exponent of the least error, or why none is better than 1."""
        encoding = Affine(self.bits, self.group, zero=self.zero)
        matrices = _stacked(program, edge)
        none = torch.ones(edge.count, dtype=torch.float64)
        if why := encoding.refuses(tuple(matrices.shape)):
            return none, why
        moment = moments(walk, edge.x)
        size = _by_channel(edge, moment.diagonal(), "mean").sqrt()
        size = size.clamp_min(float(size.max()) * 1e-4) if float(size.max()) else none
        best, least, kept = none, float("inf"), 0
        first = 0.0
        for i in range(GRID):
            by = size ** (i / GRID)
            by = by / (by.max() * by.min()).sqrt()
            columns = by[edge.columns]
            scaled = (matrices * columns).float()
            rest = encoding.decode(encoding.encode(scaled), tuple(scaled.shape)).double() / columns - matrices
            error = float(((rest @ moment) * rest).sum())
            first = first or error
            if error < least:
                best, least, kept = by, error, i
        if not kept:
            return none, "no exponent leaves a smaller error than 0"
        return best, {"exponent": kept / GRID, "error": float(f"{least / first:.3g}")}


def _stacked(program: Program, edge: Edge) -> torch.Tensor:
    """The matrices of an edge's readers, float64 [rows of all, K]."""
    names = dict.fromkeys(matrix(reader) for reader in edge.readers)
    return torch.cat([wide(program, name).flatten(0, -2) for name in names])


def _by_channel(edge: Edge, columns: torch.Tensor, how: Literal["amax", "mean"]) -> torch.Tensor:
    """A number of each column [K] as one of each channel [C]."""
    empty = torch.zeros(edge.count, dtype=columns.dtype)
    return empty.scatter_reduce(0, edge.columns, columns, how, include_self=False)
