"""Spreads evaluations over processes of this machine, or over machines with Ray where that is installed."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Protocol

import torch

from ._judge import Judge
from ._space import Candidate

Job = tuple[Candidate, Sequence[int]]
Done = tuple[Candidate, dict[int, float]]


class Workers(Protocol):
    """Takes jobs, and gives each as it is done."""

    def __call__(self, jobs: Sequence[Job]) -> Iterator[Done]: ...


@contextmanager
def workers(judge: Judge, processes: int) -> Iterator[Workers]:
    """This process alone for 1; else so many, by Ray where it is installed: a local one, or that of $RAY_ADDRESS."""
    if processes == 1:
        yield lambda jobs: ((candidate, judge(candidate, rows)) for candidate, rows in jobs)
    elif find_spec("ray") is not None:
        with _ray(judge, processes) as spread:
            yield spread
    else:
        threads = max(1, torch.get_num_threads() // processes)
        with ProcessPoolExecutor(
            processes, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(judge, threads)
        ) as pool:
            yield lambda jobs: (each.result() for each in as_completed([pool.submit(_work, job) for job in jobs]))


_judge: list[Judge] = []  # of a worker process


def _begin(judge: Judge, threads: int) -> None:
    torch.set_num_threads(threads)
    _judge[:] = [judge]


def _work(job: Job) -> Done:
    candidate, rows = job
    return candidate, _judge[0](candidate, rows)


@contextmanager
def _ray(judge: Judge, processes: int) -> Iterator[Workers]:
    import ray
    from ray.util import ActorPool

    ours = not ray.is_initialized()
    if ours:
        cluster = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": processes, "include_dashboard": False}
        ray.init(log_to_driver=False, **cluster)
    try:
        held = ray.put(judge)
        actor: Any = ray.remote(num_cpus=1)(_Actor)
        pool = ActorPool([actor.remote(held) for _ in range(processes)])
        yield lambda jobs: pool.map_unordered(lambda worker, job: worker.work.remote(job), jobs)
    finally:
        if ours:
            ray.shutdown()


class _Actor:
    """A worker of Ray."""

    def __init__(self, judge: Judge) -> None:
        _begin(judge, 1)

    def work(self, job: Job) -> Done:
        return _work(job)
