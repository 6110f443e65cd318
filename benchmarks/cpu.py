"""smelt beside other engines on this machine's CPU: one run, same shape, weights, threads and prompts, taking turns.

python benchmarks/cpu.py --venvs ~/peers --install           # once: makes an environment a peer, compiles llama.cpp
python benchmarks/cpu.py --venvs ~/peers --threads 2         # all peers that have an environment; a quarter of an hour
python benchmarks/cpu.py --recipes finequant --peers ""      # smelt alone

Measured: decoded tokens a second behind 128 and 2048 tokens of prompt, prompt tokens a second at 512, seconds from the
start of a process to its first token (files in the page cache), peak memory, seconds to convert, and the bandwidth that
reading memory has in the same run. Every engine is a process of its own, stopped by a signal while it is not asked.
Each round has prompts of its own, the same for all, so that no cache of prompts helps. An engine that fails is listed
with its last line, and no number. The weights are random: they decode as fast as trained ones.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import decode
from peers import report
from peers.bandwidth import BYTES, read_bandwidth
from peers.engines import HERE, PEERS, VENVS, Engine, install, smelt_engine
from peers.worker import Failed, Worker

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {"hidden": 1024, "layers": 24, "heads": 16, "kv-heads": 4, "intermediate": 4096, "vocabulary": 32000}
RECIPES = "w4a8,finequant,none"


@dataclass(frozen=True)
class Case:
    """One kind of request: `prompt` tokens are read, `new` are made; `metric` says what of it counts."""

    metric: str
    prompt: int
    new: int


@dataclass
class Row:
    """What is known of one engine so far; `error` ends it."""

    engine: Engine
    convert: dict[str, Any] = field(default_factory=dict)
    load: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    first_tokens: list[int] = field(default_factory=list)
    warm_up_s: float = 0.0
    peak_bytes: int = 0
    error: str | None = None

    def facts(self) -> dict[str, Any]:
        """For the JSON: everything, or nothing but the error."""
        if self.error is not None:
            return {"error": self.error}
        return {name: value for name, value in vars(self).items() if name not in ("engine", "error")}

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """A failure in here is the engine's result."""
        try:
            yield
        except Failed as fault:
            self.error = str(fault)
            print(f"{self.engine.name}: {fault}", file=sys.stderr)


@dataclass(frozen=True)
class Bench:
    """Where and how all engines run."""

    work: Path
    venvs: Path
    threads: int
    vocabulary: int
    cases: tuple[Case, ...]
    random: random.Random
    bandwidth_bytes: int = BYTES

    @property
    def context(self) -> int:
        """Most tokens that any request takes."""
        return max(case.prompt + case.new for case in self.cases)

    def worker(self, engine: Engine) -> Worker:
        """A fresh process of the engine; it loads nothing yet."""
        python = engine.python(self.venvs)
        if not python.exists():
            raise Failed(f"missing: no environment at {self.venvs / str(engine.venv)}; --install makes it")
        log = self.work / f"{engine.slug}.log"
        return Worker(python, HERE / engine.script, log, engine.environment(self.threads, self.work))

    def load(self, worker: Worker, engine: Engine) -> dict[str, Any]:
        """Load what `convert` made."""
        model = str(self.work / f"{engine.slug}.model")
        return worker.ask("load", model=model, variant=engine.variant, threads=self.threads, context=self.context)

    def prompt(self, length: int) -> list[int]:
        """Tokens that no request had before."""
        return [self.random.randrange(1, self.vocabulary) for _ in range(length)]

    def convert(self, row: Row, checkpoint: Path) -> None:
        """A peer's conversion is kept between runs. smelt's is what is measured: cold, then with its kernels built."""
        engine = row.engine
        done = self.work / f"{engine.slug}.json"
        ours = engine.venv is None
        if done.exists() and not ours:
            row.convert = json.loads(done.read_text())
            return
        print(f"{engine.name}: converting", file=sys.stderr)
        shutil.rmtree(self.work / f"{engine.slug}.cache", ignore_errors=True)
        for time_of in ("seconds", "warm_seconds") if ours else ("seconds",):
            with self.worker(engine) as worker:
                reply = worker.ask(
                    "convert",
                    checkpoint=str(checkpoint),
                    out=str(self.work / f"{engine.slug}.model"),
                    variant=engine.variant,
                    threads=self.threads,
                )
            row.convert = {**reply, **row.convert, time_of: reply["seconds"]}
        done.write_text(json.dumps(row.convert))

    def race(self, rows: list[Row], rounds: int) -> list[float]:
        """Fill the rows' samples; returns the read bandwidth of each round."""
        bandwidth = []
        with contextlib.ExitStack() as stack:
            workers = {}
            for row in rows:
                print(f"{row.engine.name}: loading and warming up", file=sys.stderr)
                with row.guarded():
                    worker = workers[row.engine] = stack.enter_context(self.worker(row.engine))
                    row.load = self.load(worker, row.engine)
                    start = time.perf_counter()
                    for case in self.cases:  # whole requests: some engines compile for their lengths
                        worker.ask("run", tokens=self.prompt(case.prompt), new=case.new)
                    row.warm_up_s = time.perf_counter() - start
            for number in range(rounds):
                print(f"round {number + 1} of {rounds}", file=sys.stderr)
                bandwidth.append(read_bandwidth(self.threads, self.work, self.bandwidth_bytes))
                for case in self.cases:
                    prompt = self.prompt(case.prompt)
                    for row in _in_turn(rows, number):
                        with row.guarded():
                            self._sample(row, case, workers[row.engine].ask("run", tokens=prompt, new=case.new))
            for row in _in_turn(rows, 0):
                with row.guarded():
                    row.peak_bytes = workers[row.engine].ask("quit")["peak_bytes"]
        return bandwidth

    def _sample(self, row: Row, case: Case, reply: Mapping[str, Any]) -> None:
        if len(reply["tokens"]) != case.new:
            raise Failed(f"gave {len(reply['tokens'])} tokens where {case.new} were asked for")
        if case.new == 1:
            value = case.prompt / reply["prefill_s"]
        else:
            value = (case.new - 1) / reply["decode_s"]
        row.samples.setdefault(case.metric, []).append(value)
        row.first_tokens.append(reply["tokens"][0])
        taken = reply["prefill_s"] + reply["decode_s"]
        row.samples.setdefault("cores", []).append(reply["cpu_s"] / taken)

    def cold_starts(self, rows: list[Row], rounds: int) -> None:
        """Seconds from starting a process to the first token behind the shortest prompt."""
        shortest = min(case.prompt for case in self.cases)
        for number in range(rounds):
            print(f"cold start {number + 1} of {rounds}", file=sys.stderr)
            prompt = self.prompt(shortest)
            for row in _in_turn(rows, number):
                with row.guarded():
                    start = time.perf_counter()
                    with self.worker(row.engine) as worker:
                        self.load(worker, row.engine)
                        worker.ask("run", tokens=prompt, new=1)
                        row.samples.setdefault("first_token_s", []).append(time.perf_counter() - start)


def main() -> None:
    """Print the tables and write the JSON."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of every `with`: stopped workers end too
    shape = {name: getattr(options, name.replace("-", "_")) for name in SHAPE}
    work = options.work / "-".join(map(str, shape.values()))
    work.mkdir(parents=True, exist_ok=True)
    cases = (
        Case("decode_128", 128, options.new_tokens),
        Case("decode_2048", 2048, options.new_tokens),
        Case("prefill_512", 512, 1),
    )
    engines = [smelt_engine(recipe) for recipe in _listed(options.recipes)]
    ours = [engine.name for engine in engines]
    engines += [PEERS[name] for name in _listed(options.peers)]
    if options.install:
        for name in {engine.venv: None for engine in engines if engine.venv}:
            print(f"installing {name}", file=sys.stderr)
            install(name, options.venvs)
    source = random.Random(time.time_ns())
    bench = Bench(work, options.venvs, options.threads, shape["vocabulary"], cases, source, options.bandwidth_bytes)
    checkpoint = write_checkpoint(work / "checkpoint", shape, bench.context)
    machine = _machine(options.threads)
    rows = [Row(engine) for engine in engines]
    for row in rows:
        with row.guarded():
            bench.convert(row, checkpoint)
    bandwidth = bench.race(_in_turn(rows, 0), options.rounds)
    bench.cold_starts(_in_turn(rows, 0), options.cold_rounds)
    found = {row.engine.name: row.facts() for row in rows}
    pairs = report.ratios(found, ours)
    low, median, high = report.spread(bandwidth)
    print(report.table(found, bandwidth), end="\n\n")
    if any(pairs.values()):
        print(report.ratio_table(pairs), end="\n\n")
    print(f"read bandwidth {median / 1e9:.1f} GB/s ({low / 1e9:.1f} to {high / 1e9:.1f}), {options.threads} threads")
    options.results.mkdir(parents=True, exist_ok=True)
    place = options.results / f"cpu-{datetime.date.today().isoformat()}.json"
    whole = {**machine, "shape": shape, "bandwidth": bandwidth, "engines": found, "ratios": pairs}
    place.write_text(json.dumps(whole, indent=1) + "\n")


def write_checkpoint(folder: Path, shape: Mapping[str, int], context: int) -> Path:
    """The model of `decode.py` in this shape, with room for `context` positions."""
    for name, value in shape.items():
        setattr(decode, name.replace("-", "_").upper(), value)
    decode.checkpoint(folder)
    place = folder / "config.json"
    config = {**json.loads(place.read_text()), "max_position_embeddings": max(4096, context)}
    place.write_text(json.dumps(config))
    return folder


def _in_turn(rows: list[Row], number: int) -> list[Row]:
    """Those that have not failed, another one first in every round."""
    alive = [row for row in rows if row.error is None]
    turn = number % len(alive) if alive else 0
    return alive[turn:] + alive[:turn]


def _machine(threads: int) -> dict[str, Any]:
    """What the numbers depend on; warns of other load."""
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"the machine is not idle (load {load:.1f}): read what follows as orders", file=sys.stderr)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit + (" and changes" if changed else ""),
        "cpu": named[0] if named else platform.processor(),
        "threads": threads,
        "load_before": load,
        "python": platform.python_version(),
    }


def _listed(names: str) -> list[str]:
    return [name for name in names.split(",") if name]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    work = Path(tempfile.gettempdir()) / "smelt-cpu-benchmark"
    parser.add_argument("--recipes", default=RECIPES, help="of smelt, parted by commas; options behind colons")
    parser.add_argument("--peers", default=",".join(PEERS), help=f"parted by commas; known: {', '.join(PEERS)}")
    parser.add_argument("--venvs", type=Path, default=work / "venvs", help="folder of the peers' environments")
    parser.add_argument("--install", action="store_true", help=f"make those that are missing: {', '.join(VENVS)}")
    parser.add_argument("--work", type=Path, default=work, help="folder of checkpoint and conversions, kept; 6 GB")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--new-tokens", type=int, default=33, help="of a decode request; the first is not timed")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cold-rounds", type=int, default=3, help="fresh processes of each engine")
    parser.add_argument("--bandwidth-bytes", type=int, default=BYTES, help="read to measure the memory's bandwidth")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the JSON")
    for name, value in SHAPE.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    if unknown := set(_listed(options.peers)) - set(PEERS):
        parser.error(f"unknown peer {min(unknown)}; known: {', '.join(PEERS)}")
    if options.new_tokens < 2:
        parser.error("--new-tokens is at least 2: the first one is not timed")
    return options


if __name__ == "__main__":
    main()
