"""Removes neurons and heads that others stand in for (STAT, Flynn et al. 2024, arXiv:2406.00061)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from ...ir.encoding import Dense
from ...ir.errors import SmeltError
from ...ir.ops import arguments
from ...ir.program import Program
from ...ir.shapes import derive
from .._walk import Walk
from ..base import Calibration, Effect, Exactness, Outcome, Pass, Samples
from ._interpolate import gram_of, interpolation, pivots, selection, unexplained
from ._shrink import resize, shrink
from ._trace import Kind
from ._units import Site, find_units

_KINDS: tuple[Kind, ...] = ("neurons", "heads")
_FACT = "unpruned"  # the fact that keeps each site's number of units before any was removed


@dataclass(frozen=True)
class Interpolate(Pass):
    """Picks the columns A[:, I] of a layer's activations that span the others, A ≈ A[:, I] T, and keeps their units.

    The rows that compute the other columns go, and the product that reads them becomes W Tᵀ, so that matrices shrink
    and nothing is gathered at run time. A unit is a neuron of an MLP, or a key-value head with all its query heads.
    Sites are treated in graph order; each sees the activations that the ones before it leave.

    neurons: share of a layer's neurons to remove.
    heads: share of a layer's key-value heads to remove.
    select: how units are chosen: `id` by column-pivoted QR of the activations, `magnitude` by the norm of their
        weights.
    correct: whether the reading product is refitted to what is left; false is an ablation.
    ridge: damping of the fit, relative to the mean square of the activations.
    budget: `uniform` removes the share everywhere, `global` over the whole model, where one error bound allows most.
    multiple: columns left in a product are a multiple of this, for encodings that store columns in groups.
    layers: which sites of a kind to prune, counted from 0 in graph order; all by default.

    Shares are of the unpruned model: a second run with the same shares finds nothing left to do.

    Deviations: T is a damped least-squares fit to all tokens instead of the triangular solve on a sketch. The bound of
    `global` is met on the unpruned activations, by a share of units instead of operations.
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    effects: ClassVar[frozenset[Effect]] = frozenset({"numerics", "shapes"})

    neurons: float = 0.25
    heads: float = 0.0
    select: Literal["id", "magnitude"] = "id"
    correct: bool = True
    ridge: float = 1e-6
    budget: Literal["uniform", "global"] = "uniform"
    multiple: int = 32
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Refuses options that ask for nothing, for everything, or for a fit without damping."""
        for kind in _KINDS:
            if not 0 <= getattr(self, kind) < 1:
                raise SmeltError(f"{kind} is a share from 0 to below 1, but is {getattr(self, kind)}")
        if not self.neurons and not self.heads:
            raise SmeltError("neurons and heads are both 0: nothing to remove")
        if not 0 < self.ridge < math.inf:
            raise SmeltError(f"ridge must be above 0, but is {self.ridge}")
        if self.multiple < 1:
            raise SmeltError(f"multiple is a count of columns, but is {self.multiple}")
        if self.budget == "global" and self.select != "id":
            raise SmeltError("budget: global weighs layers by what select: id leaves unexplained; use it with that")

    @property
    def calibration(self) -> Calibration:
        return "inputs"

    def requires(self, program: Program) -> Iterator[str]:
        """A model of text without a cache, whose weights at every site that is asked for are dense."""
        if program.cache is not None:
            since = program.changed_by("cache")
            yield (
                f"prune.interpolate must come before the cache is inserted: its sites fix the number of heads"
                f"{',' if since else ''}{since}"
            )
            return
        if "tokens" not in program.inputs or set(program.inputs) - {"tokens", "positions", "mask"}:
            found = ", ".join(program.inputs)
            yield f"the inputs of {program.name} must be tokens with positions or a mask, but are {found}"
            return
        names = [name for site in self._asked_for(find_units(program)[0], {}) for name in site.weights]
        coded = [name for name in names if not isinstance(program.weights[name].encoding, Dense)]
        if coded:
            yield (
                f"weights of {coded[0]} must be Dense, but are {program.weights[coded[0]].encoding}"
                f"{program.changed_by(coded[0])}{f', and {len(coded) - 1} more' if len(coded) > 1 else ''}: "
                "put prune.interpolate in front"
            )

    def apply(self, program: Program, samples: Samples | None) -> Outcome:
        """Prune one site after the other, each fitted on the calibration text as the pruned model sees it so far."""
        if samples is None:
            raise SmeltError("prune.interpolate fits its corrections on text: give calibration texts")
        sites, refused = find_units(program)
        skipped = {name: refusal.reason for name, refusal in refused.items() if getattr(self, refusal.kind)}
        before = _parameters(program)
        unpruned = dict(program.facts.get(_FACT, {}))
        todo = self._counts(program, self._asked_for(sites, skipped), samples, unpruned, skipped)
        notes: dict[str, Any] = {}
        walk = Walk(program, samples)
        for at, (site, count) in enumerate(todo.items()):
            samples.progress(at, len(todo), site.name)
            gram = gram_of(walk, site.consumer)
            units = self._chosen(program, site, gram, count)
            edits = resize(site, units)
            if isinstance(edits, str):
                skipped[site.name] = edits
                continue
            kept = site.columns[units].flatten().sort().values
            t = interpolation(gram, kept, self.ridge) if self.correct else selection(gram, kept)
            matrix = program.weights[site.consumer_weight].dense(torch.float64) @ t.T
            shrink(program, site, units, edits, matrix.float())
            unpruned.setdefault(site.name, len(site.columns))
            error = round(unexplained(gram, kept, t), 5)
            notes[site.name] = {"left": count, "of": len(site.columns), "unexplained": error}
        if not notes:
            return Outcome((), skipped)
        program.facts[_FACT] = unpruned
        derive(program)
        total = {"before": before, "after": _parameters(program)}
        return Outcome(tuple(notes), skipped, {"sites": notes, "parameters": total, **samples.amount})

    def _asked_for(self, sites: Sequence[Site], skipped: dict[str, str]) -> list[Site]:
        """Sites of the kinds and layers that the options name."""
        asked = []
        for kind in _KINDS:
            of_kind = [site for site in sites if site.kind == kind] if getattr(self, kind) else []
            if of_kind and any(not 0 <= layer < len(of_kind) for layer in self.layers or ()):
                raise SmeltError(
                    f"layers are counted from 0 to {len(of_kind) - 1} here, but are {list(self.layers or ())}"
                )
            for layer, site in enumerate(of_kind):
                if self.layers is None or layer in self.layers:
                    asked.append(site)
                else:
                    skipped[site.name] = "layers leaves it out"
        return sorted(asked, key=sites.index)

    def _counts(
        self,
        program: Program,
        sites: list[Site],
        samples: Samples,
        unpruned: dict[str, int],
        skipped: dict[str, str],
    ) -> dict[Site, int]:
        """How many units to leave of each site."""
        found: dict[Site, int] = {}
        for kind in _KINDS:
            of_kind = [site for site in sites if site.kind == kind]
            targets = {s: (1 - getattr(self, kind)) * unpruned.get(s.name, len(s.columns)) for s in of_kind}
            if self.budget == "global" and sum(len(site.columns) for site in of_kind) > sum(targets.values()):
                targets = self._balanced(program, samples, targets)
            for site, target in targets.items():
                count, present = self._nearest(site, target), len(site.columns)
                if count == present:
                    reason = (
                        f"has {present} of {unpruned.get(site.name, present)} {kind}, and {target:g} are to be left"
                    )
                    nearer = f", which no other multiple of {self.multiple} columns is nearer to"
                    skipped[site.name] = reason + (nearer if present > target else "")
                elif isinstance(edits := resize(site, torch.arange(count)), str):
                    skipped[site.name] = edits
                else:
                    found[site] = count
        return {site: found[site] for site in sites if site in found}

    def _nearest(self, site: Site, target: float) -> int:
        """The count of units nearest to `target` whose columns are a multiple; the present one if none is nearer."""
        present, width = site.columns.shape
        counts = [n for n in range(1, present) if n * width % self.multiple == 0]
        return (
            min([present, *counts], key=lambda n: (abs(n - target), n != present, -n)) if target < present else present
        )

    def _balanced(self, program: Program, samples: Samples, targets: dict[Site, float]) -> dict[Site, float]:
        """Counts under one bound on the unexplained part of every site, together what the targets are together."""
        errors, walk = {}, Walk(program, samples)
        for at, site in enumerate(targets):
            samples.progress(at, len(targets), f"{site.name}: unpruned")
            errors[site] = pivots(gram_of(walk, site.consumer), site.columns, len(site.columns))[1]
        low, high = 0.0, 1.0
        for _ in range(50):
            bound = (low + high) / 2
            counts = {site: float((error > bound).sum() + 1) for site, error in errors.items()}
            low, high = (bound, high) if sum(counts.values()) > sum(targets.values()) else (low, bound)
        return counts

    def _chosen(self, program: Program, site: Site, gram: torch.Tensor, count: int) -> torch.Tensor:
        """The units to keep, ascending."""
        if self.select == "id":
            return pivots(gram, site.columns, count)[0].sort().values
        read = program.weights[site.consumer_weight].dense(torch.float64).square().sum(0)
        score = read[site.columns].sum(1)
        for node, numbers in site.producers:
            written = program.weights[str(arguments(node)["weight"].target)].dense(torch.float64).square().sum(1)
            score.index_add_(0, site.units_of(numbers), written)
        return score.topk(count).indices.sort().values


def _parameters(program: Program) -> int:
    return sum(math.prod(weight.shape) for weight in program.weights.values())
