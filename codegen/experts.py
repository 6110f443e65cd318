"""Routed experts on stored weights: the GEMV of every chosen expert, so that no expert is decoded as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..ir.ops import GATED
from ..ir.weight import Weight
from . import gemv
from .plan import Out, Run
from .rows import RowKernel, row_kernel


def covers(gate_up: Weight, down: Weight) -> str | None:
    """Why the experts of these weights have no kernel, or None."""
    for weight in (gate_up, down):
        if len(weight.shape) != 3:
            return f"needs weights [E, N, K], not {list(weight.shape)}"
        if reason := gemv.covers(weight.encoding, weight.shape[1:]):
            return f"gemv of {weight.encoding}: {reason}"
    return None


@dataclass(frozen=True)
class ExpertsKernel:
    """`experts` by one GEMV an expert and side; every row in one order, so that T = 1 and a tree agree to the bit.

    A call makes small temporaries: how many rows an expert gets depends on the data.
    """

    gate_up: Weight
    down: Weight

    @property
    def name(self) -> str:
        return f"experts.{gemv.name(self.gate_up.encoding)}"

    @property
    def source(self) -> str:
        return gemv.source(self.gate_up.encoding)

    @cached_property
    def _bound(self) -> tuple[list[gemv.Bound], list[gemv.Bound]]:
        return _each(self.gate_up), _each(self.down)

    def contiguous(self, args: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(name for name in ("x", "chosen") if not args[name].is_contiguous())

    def bind(self, args: Mapping[str, Any], out: Out) -> Run:
        assert isinstance(out, torch.Tensor)
        x, chosen, shares = args["x"], args["chosen"], args["shares"]
        ups, downs = self._bound
        (count, slots), inner = chosen.shape, self.down.shape[2]
        rows, hidden = torch.empty(count * slots, x.shape[1]), torch.empty(count * slots, 2 * inner)
        mixed, results = torch.empty(count * slots, inner), torch.empty(count * slots, x.shape[1])
        gated = row_kernel(GATED.target)
        assert isinstance(gated, RowKernel)
        gate, up = hidden.chunk(2, -1)
        activate = gated.bind({"gate": gate, "up": up, "act": args["act"]}, mixed)

        def run() -> None:
            order = chosen.view(-1).argsort(stable=True)  # slots by expert
            shared = torch.bincount(chosen.view(-1), minlength=len(ups)).tolist()
            torch.index_select(x, 0, order // slots, out=rows)
            _through(ups, shared, rows, hidden)
            activate()
            _through(downs, shared, mixed, results)
            places = order.argsort().view(count, slots)
            out.zero_()
            for slot in range(slots):  # one after the other: a sum of torch might take another order for fewer rows
                out.add_(results[places[:, slot]] * shares[:, slot, None])

        return run


def _each(weight: Weight) -> list[gemv.Bound]:
    """The kernel of every expert over its slice of the parts."""
    kernel = gemv.Gemv(weight.encoding)
    parts = dict(weight.parts)
    return [
        kernel.bind({name: part[expert] for name, part in parts.items()}, weight.shape[1:])
        for expert in range(weight.shape[0])
    ]


def _through(experts: list[gemv.Bound], shared: list[int], x: torch.Tensor, y: torch.Tensor) -> None:
    """y = each expert of its rows of x; `shared[e]` rows belong to expert e, in order."""
    first = 0
    for expert, count in zip(experts, shared, strict=True):
        if count:
            expert(x[first : first + count], y[first : first + count])
        first += count
