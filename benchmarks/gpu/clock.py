"""Times on a GPU: CUDA events around every run, entries in turns, other memory read before each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

from .contest import Outputs, Run

# bytes read before a run: many times any cache, so that no entry finds its operands there (written ones would have to
# go back to memory during the run). It takes a third of a millisecond on an H100, in which the host prepares the run.
TRASH = 1 << 30
LEAST, MOST = 10, 100  # repetitions
LONG = 0.6  # seconds of repetitions that are enough for one entry

Pair: TypeAlias = tuple[torch.cuda.Event, torch.cuda.Event]


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches: bytes a second of a copy, read and written counted, and operations of a bf16 product."""

    bandwidth: float
    rate: float


class EventClock:
    """The clock of `contest.py` for the current CUDA device."""

    def __init__(self) -> None:
        self.trash = torch.zeros(TRASH // 4, device="cuda")
        self.ceilings = self._ceilings()

    def race(self, runs: Mapping[str, Run]) -> dict[str, list[float]]:
        """Seconds of each run, in turns, after two that warm up."""
        first = 0.0
        for _ in range(2):
            first = sum(self._once(run) for run in runs.values())
        repeats = max(LEAST, min(MOST, int(LONG * len(runs) / max(first, 1e-9))))
        events: dict[str, list[Pair]] = {name: [] for name in runs}
        for _ in range(repeats):
            for name, run in runs.items():
                events[name].append(self._between(run))
        torch.cuda.synchronize()
        return {name: [_seconds(*pair) for pair in pairs] for name, pairs in events.items()}

    def captured(self, run: Run) -> tuple[Run, Outputs]:
        """The run as the replay of a CUDA graph, and its outputs, which lie where every replay writes them."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return replay, outputs

    def peak(self, run: Run) -> int:
        """Most bytes beside what was allocated before."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def bound(self, nbytes: float, flops: float) -> float:
        """The longer of moving the bytes and computing the operations."""
        return max(nbytes / self.ceilings.bandwidth, flops / self.ceilings.rate)

    def _between(self, run: Run) -> Pair:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.trash.sum()
        start.record()
        run()
        end.record()
        return start, end

    def _once(self, run: Run) -> float:
        pair = self._between(run)
        torch.cuda.synchronize()
        return _seconds(*pair)

    def _ceilings(self) -> Ceilings:
        """Best of a few: what limits everything else."""
        source = torch.empty(1 << 30, dtype=torch.int8, device="cuda").random_()
        target = torch.empty_like(source)
        a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        times = self.race({"copy": lambda: (target.copy_(source),), "product": lambda: (a @ b,)})
        return Ceilings(2 * source.numel() / min(times["copy"]), 2 * 8192**3 / min(times["product"]))


def _seconds(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    return float(start.elapsed_time(end)) / 1e3
