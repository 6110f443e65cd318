"""The side-by-side benchmark asks engines in turn, drops those that fail, and pairs what it compares by round."""

import importlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FAKE = """
import os, sys, time
sys.path.insert(0, {peers!r})
from serve import Clock, serve

def convert(checkpoint, out, variant, threads):
    return {{"bytes": 3}}

def load(model, variant, threads, context):
    asked = []
    def run(tokens, new):
        print("chatter between the replies")
        asked.append(new)
        if variant == "raises":
            raise ValueError("first line\\nlast line")
        if variant == "dies" or (variant == "dies later" and len(asked) > 4):
            print("first\\rlast words", file=sys.stderr, flush=True)
            os._exit(3)
        if variant == "hangs":
            time.sleep(60)
        clock = Clock()
        for number in range(new - (variant == "short")):
            clock.tick(number)
        return clock.reply()
    return run, {{"variant": variant}}

serve(convert, load, ("torch",))
"""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Modules of the benchmark by name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    place = tmp_path / "run_fake.py"
    place.write_text(FAKE.format(peers=str(BENCHMARKS / "peers")))
    return place


def started(bench: Any, fake: Path, variant: str) -> Any:
    worker = bench("peers.worker").Worker(Path(sys.executable), fake, fake.with_suffix(".log"), {})
    reply = worker.ask("load", model="m", variant=variant, threads=1, context=8)
    assert reply["variant"] == variant and reply["versions"]["torch"]
    return worker


def stops(process: int) -> bool:
    """Whether the process is stopped by and by: a signal takes its time."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        if os.waitid(os.P_PID, process, os.WSTOPPED | os.WNOWAIT | os.WNOHANG):
            return True
        time.sleep(0.01)
    return False


def test_an_engine_answers_and_is_stopped_in_between(bench: Any, fake: Path) -> None:
    with started(bench, fake, "good") as worker:
        for _ in range(2):
            reply = worker.ask("run", tokens=[1, 2], new=3)
            assert reply["tokens"] == [0, 1, 2] and {"prefill_s", "decode_s", "cpu_s"} < reply.keys()
            assert stops(worker._process.pid)
        assert worker.ask("quit")["peak_bytes"] >= 0
    assert worker._process.returncode is not None


@pytest.mark.parametrize(
    ("variant", "words"),
    [("raises", "^last line$"), ("dies", "^last words$"), ("hangs", "^no answer to run within 1 s$")],
)
def test_a_failure_is_one_line(bench: Any, fake: Path, variant: str, words: str) -> None:
    with started(bench, fake, variant) as worker, pytest.raises(bench("peers.worker").Failed, match=words):
        worker.patience = 1.0 if variant == "hangs" else 60.0
        worker.ask("run", tokens=[1], new=2)


def test_the_clock_parts_first_from_later_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS / "peers")
    serve = importlib.import_module("serve")
    times = iter([10.0, 12.0, 12.5, 13.5])
    monkeypatch.setattr(serve.time, "perf_counter", lambda: next(times))
    clock = serve.Clock()
    for token in (7, 8, 9):
        clock.tick(token)
    assert clock.reply() == {"prefill_s": 2.0, "decode_s": 1.5, "tokens": [7, 8, 9]}


def race(bench: Any, fake: Path, monkeypatch: pytest.MonkeyPatch, *variants: str) -> dict[str, Any]:
    cpu, engines = bench("cpu"), bench("peers.engines")
    monkeypatch.setattr(cpu, "read_bandwidth", lambda *_: 1e9)
    cases = (cpu.Case("decode_128", 8, 3), cpu.Case("prefill_512", 16, 1))
    place = cpu.Bench(fake.parent, fake.parent, 1, 100, cases, random.Random(0))
    rows = [cpu.Row(engines.Engine(variant, str(fake), variant)) for variant in variants]
    for row in rows:
        place.convert(row, fake)
    assert place.race(rows, 2) == [1e9, 1e9]
    place.cold_starts(cpu._in_turn(rows, 0), 2)
    return {row.engine.name: row.facts() for row in rows}


def test_an_engine_that_fails_ends_alone(bench: Any, fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = race(bench, fake, monkeypatch, "good", "dies later", "short", "better")
    assert found["dies later"] == {"error": "last words"}
    assert found["short"] == {"error": "gave 2 tokens where 3 were asked for"}
    for name in ("good", "better"):
        counts = {metric: len(values) for metric, values in found[name]["samples"].items()}
        assert counts == {"decode_128": 2, "prefill_512": 2, "first_token_s": 2, "cores": 4}
        assert found[name]["warm_up_s"] > 0 and found[name]["convert"]["warm_seconds"] >= 0
    lines = bench("peers.report").table(found, [1e9, 1e9]).splitlines()
    assert "| dies later | last words |" in lines
    pairs = bench("peers.report").ratios(found, ["good", "short"])
    assert set(pairs) == {"good"} and set(pairs["good"]) == {"better"}


def test_ratios_are_paired_by_round(bench: Any) -> None:
    ratio = bench("peers.report").ratio
    ours, theirs = {"decode_128": [10.0, 40.0, 90.0]}, {"decode_128": [5.0, 10.0, 30.0]}
    assert ratio("decode_128", ours, theirs) == (2.5, 3.0, 3.5)  # of 2, 4 and 3; the medians' ratio is 4
    assert ratio("first_token_s", {"first_token_s": [2.0]}, {"first_token_s": [6.0]}) == (3.0, 3.0, 3.0)
    assert ratio("decode_2048", ours, theirs) is None


def test_the_bound_is_reading_the_encoded_weights(bench: Any) -> None:
    report = bench("peers.report")
    row = {"samples": {"decode_128": [50.0, 60.0]}, "convert": {"read_bytes": 200, "bytes": 300}}
    assert report.share_of_bound(row, [20000.0, 20000.0])[1] == pytest.approx(0.55)
    assert report.share_of_bound({**row, "convert": {"bytes": 300}}, [1.0]) is None


def test_first_tokens_are_compared_with_transformers(bench: Any) -> None:
    same = bench("peers.report").same_first
    assert same({"first_tokens": [1, 2, 3, 4]}, {"first_tokens": [1, 2, 3, 5]}) == 0.75
    assert same({"first_tokens": [1]}, {"error": "missing"}) is None


def test_reading_memory_takes_time(bench: Any, tmp_path: Path) -> None:
    bandwidth = bench("peers.bandwidth")
    for _ in range(2):  # built, and built already
        assert 1e8 < bandwidth.read_bandwidth(2, tmp_path, 1 << 22) < 1e13
    assert 1e8 < bandwidth._by_numpy(2, 1 << 22) < 1e13


def test_half_an_environment_is_taken_away(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines, steps = bench("peers.engines"), []

    def step(words: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
        assert "GGML_AMX_INT8=OFF" in env["CMAKE_ARGS"]
        steps.append(words[2])
        (tmp_path / "llama-cpp").mkdir(exist_ok=True)
        return subprocess.CompletedProcess(words, int(words[2] == "pip"))

    monkeypatch.setattr(engines.subprocess, "run", step)
    engines.install("llama-cpp", tmp_path)
    assert steps == ["venv", "pip"] and not (tmp_path / "llama-cpp").exists()


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS / "peers")
    return importlib.import_module("run_llama_cpp")


def test_neighbours_rotate_as_halves_did(llama: ModuleType) -> None:
    heads, size = 3, 8
    values = numpy.random.default_rng(0).normal(size=(heads * size, 5))
    turn = numpy.exp(1j * numpy.arange(size // 2))[:, None]

    def rotated(first: Any, second: Any) -> Any:
        return (first + 1j * second) * turn

    for head, moved in zip(
        values.reshape(heads, size, 5), llama.neighbours(values, heads).reshape(heads, size, 5), strict=True
    ):
        assert numpy.array_equal(rotated(head[: size // 2], head[size // 2 :]), rotated(moved[0::2], moved[1::2]))
        assert not numpy.array_equal(head, moved)


def test_every_weight_has_a_place_in_gguf(bench: Any, llama: ModuleType, tmp_path: Path) -> None:
    cpu = bench("cpu")
    folder = cpu.write_checkpoint(tmp_path / "m", tiny_shape(), 5000)
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 5000
    found = dict(llama._tensors(folder))
    assert len({llama._renamed(name) for name in found}) == len(found) == 3 + 9 * 2
    bits = found["model.layers.1.mlp.up_proj.weight"]
    values = torch.from_numpy((bits.astype(numpy.uint32) << 16).view(numpy.float32).copy())
    assert values.shape == (128, 64) and 0.015 < float(values.std()) < 0.025


def tiny_shape() -> dict[str, int]:
    return {"hidden": 64, "layers": 2, "heads": 4, "kv-heads": 2, "intermediate": 128, "vocabulary": 300}


@pytest.mark.slow
def test_a_whole_run_lists_what_is_missing(tmp_path: Path) -> None:
    shape = [word for name, value in tiny_shape().items() for word in (f"--{name}", str(value))]
    words = [
        *("--recipes", "none,no-such-recipe", "--peers", "llama.cpp-q4_0", "--venvs", tmp_path / "venvs"),
        *("--work", tmp_path / "work", "--results", tmp_path / "results", "--bandwidth-bytes", 1 << 22),
        *("--threads", 1, "--new-tokens", 3, "--rounds", 2, "--cold-rounds", 1, *shape),
    ]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "cpu.py", *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(BENCHMARKS.parent / "src")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "| llama.cpp-q4_0 | missing: no environment" in done.stdout and "read bandwidth" in done.stdout
    (written,) = (tmp_path / "results").glob("cpu-*.json")
    found = json.loads(written.read_text())
    assert "no-such-recipe" in found["engines"]["smelt no-such-recipe"]["error"]
    good = found["engines"]["smelt none"]
    assert {metric: len(values) for metric, values in good["samples"].items()} == {
        "decode_128": 2, "decode_2048": 2, "prefill_512": 2, "first_token_s": 1, "cores": 6,
    }  # fmt: skip
    assert good["peak_bytes"] > 0 and 0 < good["convert"]["read_bytes"] < good["convert"]["bytes"]
    assert {"commit", "cpu", "threads", "bandwidth", "date"} < found.keys()
