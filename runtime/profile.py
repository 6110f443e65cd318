"""What each kernel of a step takes: time, bytes of weights that it reads, and its share of what memory allows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..codegen.bandwidth import read_bandwidth
from ..codegen.plan import Plan
from ..codegen.unit import Unit
from .bound import Bound
from .session import Session

ROUNDS = 9


@dataclass(frozen=True)
class Timing:
    """One kernel's calls in a step: how many, their seconds together, and the bytes of weights that they read.

    `share`: of the machine's read bandwidth; None where a kernel reads no weights.
    """

    kernel: str
    calls: int
    nodes: tuple[str, ...]
    seconds: float
    nbytes: int
    share: float | None


def profile(plan: Plan, tokens: int = 1, context: int = 128) -> list[Timing]:
    """Kernels of a decoder's step of `tokens` new tokens behind `context` of them, the longest first.

    Medians of some steps; kernels are timed with a meeting of all threads behind each, which costs about 1 us a call.
    """
    vocabulary = int(plan.program.facts["vocabulary"])
    random = torch.Generator().manual_seed(0)
    session = Session(plan, 1, context + tokens)
    session.prefill([torch.randint(vocabulary, (context,), generator=random).tolist()])
    step = torch.randint(vocabulary, (1, tokens), generator=random)
    positions = context + torch.arange(tokens)[None]
    session.step(step, positions)
    rounds = []
    for _ in range(ROUNDS):
        session.cache.begin(positions)
        rounds.append(_timed(session.bound(tokens)))
    taken = [statistics.median(each) for each in zip(*([t for *_, t in r] for r in rounds), strict=True)]
    return _summed((name, node, nbytes, t) for (name, node, nbytes, _), t in zip(rounds[0], taken, strict=True))


def _timed(bound: Bound) -> list[tuple[str, str, int, float]]:
    """(kernel, node, bytes, seconds) of every call of one run."""
    out: list[tuple[str, str, int, float]] = []
    for made in bound.calls:
        if isinstance(made, Unit):
            calls = zip(made.calls, made.timed(), strict=True)
            out += [(c.function.label, c.node, c.nbytes, seconds) for c, seconds in calls]
            continue
        start = time.perf_counter()
        made()
        out.append((_name(made), "", 0, time.perf_counter() - start))
    return out


def _name(made: Any) -> str:
    function = getattr(made, "func", made)
    return f"torch.{getattr(function, '__name__', str(function))}"


def _summed(calls: Iterable[tuple[str, str, int, float]]) -> list[Timing]:
    kinds: dict[str, list[tuple[str, int, float]]] = {}
    for name, node, nbytes, seconds in calls:
        kinds.setdefault(name, []).append((node, nbytes, seconds))
    bandwidth = read_bandwidth()
    rows = []
    for name, found in kinds.items():
        nbytes, seconds = sum(b for _, b, _ in found), sum(s for *_, s in found)
        share = nbytes / bandwidth / seconds if nbytes and seconds else None
        rows.append(Timing(name, len(found), tuple(node for node, *_ in found), seconds, nbytes, share))
    return sorted(rows, key=lambda row: -row.seconds)
