"""How much of a model is left with some of its units, and which units leave to meet a limit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ...ir.errors import SmeltError
from ...ir.ops import EXPERTS, HEAD, LINEAR, is_op
from ...ir.program import Program
from ._gates import Branch, Place

Measure = Literal["parameters", "operations"]


@dataclass(frozen=True)
class Size:
    """The size of a model as a function of what is left of its units, which are numbered through all places.

    fixed: what no unit is a part of. products: for each other weight its places that no unit is a part of, and the
    units with how much each of them is of every dim, as slices and float64 [U].
    """

    fixed: float
    products: tuple[tuple[float, tuple[tuple[slice, torch.Tensor], ...]], ...]

    @classmethod
    def of(cls, program: Program, places: Sequence[Place], measure: Measure) -> Size:
        """In numbers that are stored, or that one token is multiplied with."""
        units, extents = slices(places), [place.extents(program) for place in places]
        fixed, products = 0.0, []
        for name, weight in program.weights.items():
            shape = list(weight.shape)
            parts = []
            for each, found in zip(units, extents, strict=True):
                if name in found:
                    dim, counts = found[name]
                    parts.append((each, counts.double()))
                    if dim is not None:
                        shape[dim] = 1
            times = 1
            if measure == "operations":
                times = sum(is_op(user, LINEAR, HEAD, EXPERTS) for user in program.uses(name))
            if parts:
                products.append((float(times * math.prod(shape)), tuple(parts)))
            else:
                fixed += times * math.prod(shape)
        return cls(fixed, tuple(products))

    def __call__(self, left: torch.Tensor) -> torch.Tensor:
        """The size, float64, with so much left of each unit [N], 0 to 1: expected where these are chances."""
        left = left.double()
        total = left.new_tensor(self.fixed)
        for factor, parts in self.products:
            term = left.new_tensor(factor)
            for units, counts in parts:
                term = term * (left[units] @ counts)
            total = total + term
        return total

    @property
    def full(self) -> float:
        """The size with all units."""
        return self.fixed + sum(f * math.prod(float(counts.sum()) for _, counts in parts) for f, parts in self.products)

    @torch.enable_grad()
    def costs(self, left: torch.Tensor) -> torch.Tensor:
        """What each unit is of the size, float64 [N]; those of one place together are the sum."""
        at = left.double().requires_grad_()
        (found,) = torch.autograd.grad(self(at), at)
        return found


def slices(places: Sequence[Place]) -> list[slice]:
    """The numbers of the units of each place."""
    found, at = [], 0
    for place in places:
        count = int(place.index.max()) + 1
        found.append(slice(at, at + count))
        at += count
    return found


def chosen(places: Sequence[Place], size: Size, worth: torch.Tensor, limit: float, multiple: int) -> torch.Tensor:
    """The units to keep, bool [N], whose size is at most `limit`, and by less than any unit below: those of most worth.

    Units of a place leave in lots of which its channels are a multiple, and one lot stays; so does one attention.
    Raises SmeltError where too few can leave.
    """
    lots = _lots(places, worth, multiple)
    kept = torch.ones(len(worth), dtype=torch.bool)
    low, high = 0, len(lots)  # the most that can leave one after the other without falling below the limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if float(size(_without(kept, lots[:middle]))) >= limit else (low, middle - 1)
    kept, lots = _without(kept, lots[:low]), lots[low:]
    while (now := float(size(kept))) > limit:
        costs = size.costs(kept)
        there = [lot for lot in lots if costs[lot].sum() > 0]
        if not there:
            raise SmeltError(f"{now:.0f} is the least that can be left, and {limit:.0f} are asked for: lower the share")
        fitting = (each for each in there if now - float(costs[each].sum()) >= limit)
        lot = next(fitting, min(there, key=lambda each: float(costs[each].sum())))
        kept = _without(kept, [lot])
        lots = [other for other in lots if other is not lot]
    return kept


def _without(kept: torch.Tensor, lots: Sequence[torch.Tensor]) -> torch.Tensor:
    left = kept.clone()
    left[torch.cat([*lots, torch.zeros(0, dtype=torch.int64)])] = False
    return left


def _lots(places: Sequence[Place], worth: torch.Tensor, multiple: int) -> list[torch.Tensor]:
    """Units int64 that leave together, those of least worth first."""
    found: list[torch.Tensor] = []
    attention: list[torch.Tensor] = []
    for place, units in zip(places, slices(places), strict=True):
        order = worth[units].argsort() + units.start
        if isinstance(place, Branch):
            (attention if place.block.kind == "attention" else found).append(order)
            continue
        width = len(place.index) // len(order)
        together = multiple // math.gcd(multiple, width)
        first = len(order) % together
        found += [order[:first]] if 0 < first < len(order) else []
        found += order[first:].split(together)[:-1]
    found += sorted(attention, key=lambda lot: float(worth[lot]))[:-1]
    return sorted(found, key=lambda lot: float(worth[lot].mean()))
