"""Solves the matrices of a model one after the other, each for what the text gives behind those that are solved."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...ir.encoding import Encoding
from ...ir.errors import SmeltError
from ...ir.program import Program
from ...ir.weight import Weight
from .._finished import Finished
from .._walk import Walk
from ..base import Pass, Samples
from ._gptq import Solved
from ._matrices import siblings
from ._moments import Attended, moments

Solve = Callable[[Weight, torch.Tensor, Encoding], Solved]


def in_order(
    program: Program,
    options: Pass,
    samples: Samples,
    encodings: Mapping[str, Encoding],
    solve: Solve,
    damp: float,
    least: float | None = None,
) -> dict[str, dict[str, Any]]:
    """Encode what matrix products read; what there is to tell of each, in order. Others of `encodings` are left.

    `solve` is given a matrix [N, K], the second moments of its inputs float64 [K, K] and the encoding. What a
    run with the same options that was broken off has finished is taken up. least: tokens count by the attention that
    they get, this much without any; None: all alike.
    """
    finished, walk = Finished.of(program, options, samples), Walk(program, samples)
    weighted = Attended(walk, least) if least is not None else None
    sites: dict[str, dict[str, Any]] = {}
    todo = [each for each in siblings(program) if any(name in encodings for name in each.names)]
    for at, each in enumerate(todo):
        samples.progress(at, len(todo), each.names[0])
        counts = weighted.counts(each) if weighted else None
        left = [name for name in each.names if name in encodings and name not in sites]
        kept = {name: finished.get(name) for name in left}
        if None in kept.values():
            hessian = moments(walk, each.x, counts)
        for name in left:
            taken = kept[name]
            if taken is not None:
                program.weights[name], sites[name] = taken, {"resumed": True}
                continue
            finite(name, program.weights[name])
            try:
                solved = solve(program.weights[name], hessian, encodings[name])
            except SmeltError as error:
                raise SmeltError(f"{name}: {error}") from error
            sites[name] = _told(solved, hessian, damp)
            program.weights[name] = Weight(
                program.weights[name].shape, solved.encoding or encodings[name], solved.parts
            )
            finished.put(name, program.weights[name])
    return sites


def finite(name: str, weight: Weight) -> torch.Tensor:
    """The decoded matrix; SmeltError where it has values that no code stands for."""
    dense = weight.dense()
    if not bool(dense.isfinite().all()):
        raise SmeltError(f"{name}: has NaN or infinite values, which no code stands for")
    return dense


def told(program: Program, sites: Mapping[str, Any], samples: Samples | None) -> dict[str, Any]:
    """The notes of a pass: what was said of each site, and bits per weight over all of them."""
    made = [program.weights[name] for name in sites]
    bits = sum(weight.bits for weight in made) / max(1, sum(math.prod(weight.shape) for weight in made))
    amount = {} if samples is None else samples.amount
    return {"sites": sites, "bits_per_weight": round(bits, 4), **amount} if sites else {}


def _told(solved: Solved, hessian: torch.Tensor, damp: float) -> dict[str, Any]:
    notes: dict[str, Any] = {"error": float(f"{solved.error:.3g}")}
    if not bool(hessian.any()):
        notes["unreached"] = "the sample text gives nothing but zeros here"
    elif solved.damp != damp:
        notes["damp"] = solved.damp
    return notes
