"""The GPU benchmark without a GPU: every check in the interpreter, no speed beside a failed one, limits that end."""

import importlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
SECTIONS = ("rows", "products", "attention", "loss", "step")
RIGHT = (torch.linspace(1, 2, 50),)
CUDA = torch.cuda.is_available()


@pytest.fixture
def piece(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Modules of the benchmark by name; "script" is gpu.py itself, which the folder of its pieces hides."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def load(name: str) -> Any:
        if name != "script":
            return importlib.import_module(f"gpu.{name}")
        spec = importlib.util.spec_from_file_location("gpu_script", BENCHMARKS / "gpu.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in [name for name in sys.modules if name.partition(".")[0] == "gpu"]:
        del sys.modules[name]


class FakeClock:
    """The first entry takes a second, the next one two, ..."""

    def race(self, runs: Mapping[str, Any]) -> dict[str, list[float]]:
        return {name: [number + 1.0, number + 1.5] for number, name in enumerate(runs)}

    def captured(self, run: Any) -> tuple[Any, Any]:
        return run, run()

    def peak(self, run: Any) -> int:
        return 100

    def bound(self, nbytes: float, flops: float) -> float:
        return max(nbytes / 10, flops / 100)


def held(piece: Any, makers: Mapping[str, Any], seconds: float = 60.0, **options: Any) -> Any:
    contest = piece("contest")
    given = contest.Contest("name", 1e-3, lambda: makers, options.pop("distance", contest.worst), **options)
    return contest.hold(given, FakeClock(), seconds)


def parted(printed: str) -> dict[str, str]:
    """What a run printed, by section."""
    parts = (part.partition("\n") for part in ("\n" + printed).split("\n\n"))
    return {name: text for name, _, text in parts}


def run(*words: str, code: str = "", script: str = "gpu.py") -> subprocess.CompletedProcess[str]:
    path = f"{ROOT / 'src'}{os.pathsep}{BENCHMARKS}"
    environment = {**os.environ, "PYTHONPATH": path} | ({"TRITON_INTERPRET": "1"} if code else {})
    start = [sys.executable, "-c", code] if code else [sys.executable, str(BENCHMARKS / script)]
    return subprocess.run([*start, *words], env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_every_check_passes_in_the_interpreter(tmp_path: Path) -> None:
    done = run("--interpret", "--results", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    parts = parted(done.stdout)
    assert all("  error " in parts[section] for section in SECTIONS)
    assert not any(word in done.stdout for word in ("FAILED", "skipped", "not installed"))
    assert "µs" not in done.stdout and not list(tmp_path.iterdir())  # nothing was timed


# module, what holds its text, and what is wrong in it
MUTANTS = [
    ("gemv_triton", "source", "& 15", "& 7"),
    ("attention_triton", "source", "tl.exp(s - safe[:, None])", "tl.exp(1.05 * (s - safe[:, None]))"),
    ("loss_triton", "KERNELS", "share - 1.0", "share - 0.95"),
    ("rows_triton", "SOURCE", "/ K + eps", "/ K * 1.1 + eps"),
]
ROTARY = [("rows_triton", "SOURCE", "tl.where(e < R, -other, other)", "other")]
WRONG = """
import importlib, runpy, sys
for module, name, right, wrong in {mutants!r}:
    module = importlib.import_module("smelt.codegen." + module)
    text = getattr(module, name)
    if callable(text):
        setattr(module, name, lambda *given, t=text, r=right, w=wrong: t(*given).replace(r, w))
    else:
        assert right in text
        setattr(module, name, text.replace(right, wrong))
sys.argv = [{script!r}, *{words!r}]
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("mutants", "sections"),
    [pytest.param(MUTANTS, "rows,products,attention,loss", marks=pytest.mark.slow), (ROTARY, "step")],
    ids=["families", "step"],
)
def test_a_wrong_kernel_fails_the_run(mutants: list[tuple[str, str, str, str]], sections: str) -> None:
    done = run(
        code=WRONG.format(
            mutants=mutants, words=["--interpret", "--sections", sections], script=str(BENCHMARKS / "gpu.py")
        )
    )
    assert done.returncode == 1, done.stdout + done.stderr
    parts = parted(done.stdout)
    assert all("FAILED: error" in parts[section] for section in sections.split(","))


@pytest.mark.slow
def test_decoding_checks_every_recipe_and_runs_its_rivals(tmp_path: Path) -> None:
    """With a step of both rivals: a cache that grows, and a static one under torch.compile."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    words = ["--interpret", "--folder", str(tmp_path / "model"), "--results", str(tmp_path / "out"), "--rounds", "1"]
    words += ["--recipes", "none,w4a8", "--prompt-tokens", "5", "--new-tokens", "3"]
    done = run(*words, script="gpu_decode.py")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("smelt none", "smelt w4a8", "transformers eager", "transformers compiled"):
        assert f"{name}: runs" in done.stdout, done.stdout
    assert "tokens/s" not in done.stdout and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_decoding_refuses_a_recipe_that_is_off(tmp_path: Path) -> None:
    """Rotary with a wrong sign."""
    words = ["--interpret", "--folder", str(tmp_path), "--recipes", "none", "--no-rivals", "--prompt-tokens", "5"]
    done = run(code=WRONG.format(mutants=ROTARY, words=words, script=str(BENCHMARKS / "gpu_decode.py")))
    assert done.returncode == 1 and "smelt none: error" in done.stdout, done.stdout + done.stderr
    assert "runs" not in done.stdout


@pytest.mark.skipif(CUDA, reason="there is a CUDA device")
def test_without_a_gpu_it_names_the_way_out() -> None:
    done = run()
    assert done.returncode == 2 and "--interpret" in done.stderr and not done.stdout


def test_no_speed_stands_beside_a_failed_check(piece: Any) -> None:
    entry = piece("contest").Entry
    off, nan = (RIGHT[0] * 1.01,), (torch.full((50,), math.nan),)

    def missing() -> Any:
        raise ModuleNotFoundError("No module named 'rival'", name="rival")

    def broken() -> Any:
        raise ValueError("first line\nlast line")

    found = held(piece, {
        "smelt": lambda: entry(lambda: RIGHT, RIGHT, lambda: off, 5.0, 20.0),
        "off": lambda: entry(lambda: off, RIGHT),
        "nothing written": lambda: entry(lambda: nan, RIGHT),
        "too few": lambda: entry(lambda: (RIGHT[0][:49],), RIGHT),
        "lenient": lambda: entry(lambda: RIGHT, RIGHT, lambda: (RIGHT[0] * 1.0001,)),
        "rival": missing,
        "broken": broken,
        "slower": lambda: entry(lambda: RIGHT, RIGHT),
    })  # fmt: skip
    assert {name for name, facts in found.items() if "seconds" in facts} == {"smelt", "slower"}
    assert found["smelt"]["bound"] == 0.5
    assert found["lenient"]["failed"] == "a wrong answer passes the check with 1e-03"
    assert found["nothing written"]["error"] is None and json.dumps(found, allow_nan=False)
    shown = piece("report").table("name", found).splitlines()
    assert [line.split()[0] for line in shown if " µs" in line] == ["smelt", "slower"]
    assert "FAILED: ValueError: last line" in shown[7] and shown[6].endswith("rival is not installed")
    assert "50% of the bound" not in shown[1] and "40% of the bound" in shown[1] and "takes × 1.83" in shown[8]


def test_a_captured_run_is_checked_again(piece: Any) -> None:
    out = RIGHT[0].clone()
    once = iter([None])

    def stale() -> tuple[torch.Tensor]:
        for _ in once:
            out.copy_(RIGHT[0])
        return (out,)

    entry = piece("contest").Entry
    found = held(piece, {"smelt": lambda: entry(stale, RIGHT, captured=True)})
    assert found["smelt"]["failed"].startswith("captured, its error inf")


def test_pieces_are_timed_along(piece: Any) -> None:
    entry, out = piece("contest").Entry, torch.empty(50)

    def whole() -> tuple[torch.Tensor]:
        return (out.copy_(RIGHT[0]),)

    found = held(piece, {"smelt": lambda: entry(whole, RIGHT, captured=True, pieces={"half": lambda: RIGHT})})
    assert found["smelt"]["seconds"] == [1.0, 1.5] and found["smelt"]["pieces"] == {"half": [2.0, 2.5]}
    assert "half alone 2250000.0 µs" in piece("report").table("name", found)


def test_too_much_memory_is_a_failure(piece: Any) -> None:
    entry = piece("contest").Entry
    makers = {f"smelt {room}": partial(entry, lambda: RIGHT, RIGHT, room=room) for room in (99, 101)}
    found = held(piece, makers, memory=True)
    assert "takes" in found["smelt 99"]["failed"] and "failed" not in found["smelt 101"]


def test_an_entry_that_takes_too_long_ends_alone(piece: Any) -> None:
    entry = piece("contest").Entry

    def slow() -> Any:
        time.sleep(20)

    start = time.monotonic()
    found = held(piece, {"smelt": lambda: entry(lambda: RIGHT, RIGHT), "slow": slow}, seconds=1.0)
    assert time.monotonic() - start < 5
    assert "seconds" in found["smelt"] and found["slow"] == {"missing": "was not ready within 1 s"}


def test_a_race_without_time_keeps_what_was_checked(piece: Any) -> None:
    entry = piece("contest").Entry
    contest = piece("contest")
    clock = FakeClock()
    clock.race = lambda runs: time.sleep(20)  # type: ignore[method-assign]
    given = contest.Contest("name", 1e-3, lambda: {"smelt": lambda: entry(lambda: RIGHT, RIGHT)}, contest.worst)
    found = contest.hold(given, clock, 0.5)
    assert found == {"smelt": {"error": 0.0, "untimed": "the time was over"}}
    assert piece("report").table("name", found).endswith("error 0.0e+00, not timed: the time was over")


def test_entries_take_turns_behind_other_memory(piece: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock_module, log = piece("clock"), []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, end: "Event") -> float:
            return 200.0  # milliseconds

    class Trash:
        def sum(self) -> None:
            log.append("trash")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    clock = object.__new__(clock_module.EventClock)
    clock.trash, clock.ceilings = Trash(), clock_module.Ceilings(10.0, 100.0)
    found = clock.race({name: partial(log.append, name) for name in "ab"})
    once = ["trash", "event", "a", "event", "trash", "event", "b", "event"]
    assert log == once * (2 + clock_module.LEAST)
    assert found == {name: [0.2] * clock_module.LEAST for name in "ab"}
    assert clock.bound(20.0, 100.0) == 2.0 and clock.bound(20.0, 500.0) == 5.0


def test_a_limit_is_for_the_main_thread(piece: Any) -> None:
    limit = piece("limit")
    with pytest.raises(limit.OutOfTime), limit.limit(0.05):
        time.sleep(5)
    with pytest.raises(limit.OutOfTime), limit.limit(-1.0):
        pass
    done = []

    def other() -> None:
        with limit.limit(0.01):
            time.sleep(0.05)
        done.append(True)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert done


def test_a_section_without_time_says_what_it_left_out(piece: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bars: dict[str, Any] = {}
    settings = piece("contest").Settings("cpu", torch.float16, tiny=True, rivals=False)
    found = piece("script").run_section("attention", 0.0, settings, None, bars)
    assert not found["contests"] and len(found["skipped"]) == 2
    assert "skipped: the section's 0 s were over" in capsys.readouterr().out


def test_bars_are_against_the_fastest_rival(piece: Any) -> None:
    bar, reached = piece("contest").Bar, piece("report").reached
    timed = {"smelt": [1.0, 2.0, 3.0], "a": [9.0, 9.0, 9.0], "b": [2.0, 6.0, 12.0]}
    facts: dict[str, Any] = {name: {"seconds": seconds, "bound": 1.5} for name, seconds in timed.items()}
    found = reached(bar("smelt", 2.5, ("a", "b", "absent")), facts)
    assert found["against"] == "b" and found["reached"] == 3.0 and found["met"]  # of 2, 3 and 4
    assert reached(bar("smelt", 0.8), facts)["reached"] == 0.75 and not reached(bar("smelt", 0.8), facts)["met"]
    facts["b"]["failed"] = "why"
    assert reached(bar("smelt", 1.0, ("b",)), facts)["met"] is None
    assert "not measured" in piece("report").bar_line("x", reached(bar("smelt", 1.0, ("b",)), facts))


def test_the_distance_sees_one_dropped_row(piece: Any) -> None:
    contest = piece("contest")
    right = torch.randn(64, 64)
    wrong = right.clone()
    wrong[3] = 0
    assert contest.worst(wrong, right) > 0.5 and contest.apart(wrong, right) > 0.05
    assert contest.equal(wrong, right) == 1 / 64
    assert contest.worst(right.half(), right) < 1e-3 and contest.apart(right.half(), right) < 1e-3


@pytest.mark.gpu
def test_a_section_runs_on_a_gpu(tmp_path: Path) -> None:
    done = run("--sections", "rows", "--results", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = tmp_path.glob("gpu-*.json")
    facts = json.loads(written.read_text())
    assert facts["ceilings"]["bandwidth"] > 1e10 and {"commit", "device", "versions", "date"} < facts.keys()
    assert all("seconds" in contest["smelt"] for contest in facts["sections"]["rows"]["contests"].values())
