"""Times on a GPU: CUDA events around every run, entries in turns, the second-level cache overwritten before each."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FrameType

import torch

from .contest import Outputs, OutOfTime, Run

TRASH = 512 << 20  # bytes written before a run: many times any cache; the host launches the run meanwhile
LEAST, MOST = 10, 50  # repetitions
LONG = 0.6  # seconds of repetitions that are enough for one entry


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches: bytes a second of a copy, read and written counted, and operations of a bf16 product."""

    bandwidth: float
    rate: float


class EventClock:
    """The clock of `contest.py` for the current CUDA device."""

    def __init__(self) -> None:
        self.trash = torch.empty(TRASH, dtype=torch.int8, device="cuda")
        self.ceilings = self._ceilings()

    def race(self, runs: Mapping[str, Run]) -> dict[str, list[float]]:
        """Seconds of each run, in turns, after two that warm up."""
        first = 0.0
        for _ in range(2):
            first = sum(self._once(run) for run in runs.values())
        repeats = max(LEAST, min(MOST, int(LONG * len(runs) / max(first, 1e-9))))
        events = {name: [] for name in runs}  # type: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]]
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

    def _between(self, run: Run) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.trash.zero_()
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


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in here once the seconds are over; only in the main thread, elsewhere nothing ends early."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
