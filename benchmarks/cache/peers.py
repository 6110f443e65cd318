"""Which presses of kvpress and which quantized caches take part, and how they are asked: in a Python of their own."""

from __future__ import annotations

import json
import os
import subprocess
import venv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .recall import Exam
from .replay import Windows

HERE = Path(__file__).resolve().parent
PACKAGES = ("torch==2.13.0", "kvpress", "optimum-quanto", "hqq")
KEPT = (0.5, 0.25)  # shares of the tokens that presses keep
PRESSES = {  # class of kvpress: options beside the ratio
    "KnormPress": {},
    "SnapKVPress": {"window_size": 32},
    "ExpectedAttentionPress": {},
    "StreamingLLMPress": {},
    "ObservedAttentionPress": {},
    "TOVAPress": {},
    "KeyDiffPress": {},
    "LagKVPress": {},
    "PyramidKVPress": {},
    "CURPress": {},
    "LeverageScorePress": {},
    "NonCausalAttnPress": {},
    "RandomPress": {},
}
QUANTIZED: dict[str, dict[str, Any]] = {  # backend and bits: options; hqq groups along the other axis
    "quanto-4": {"nbits": 4},
    "quanto-2": {"nbits": 2},
    "hqq-8": {"nbits": 8, "axis_key": 1, "axis_value": 1},
    "hqq-4": {"nbits": 4, "axis_key": 1, "axis_value": 1},
    "hqq-2": {"nbits": 2, "axis_key": 1, "axis_value": 1},
}


class Missing(Exception):
    """Why no peer takes part."""


def contestants(kept: Sequence[float] = KEPT) -> list[dict[str, Any]]:
    """What `run_peers.py` is to build, by name."""
    out: list[dict[str, Any]] = []
    for share in kept:
        for press, options in PRESSES.items():
            spec = {"name": f"kvpress {press.removesuffix('Press')} {share:.0%}", "press": press}
            eager = {"attention": "eager"} if press == "ObservedAttentionPress" else {}  # it reads attention weights
            out.append({**spec, **eager, "options": {**options, "compression_ratio": 1 - share}})
    for name, options in QUANTIZED.items():
        out.append({"name": f"transformers {name}", "quantized": name.partition("-")[0], "options": options})
    return out


def install(folder: Path) -> None:
    """Make the environment, unless it is there; pip's own words tell what goes wrong."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *PACKAGES], check=False)


def job(
    model: Path,
    exams: Mapping[str, tuple[Exam, bool]],
    windows: Mapping[int, Windows],
    prompt: Sequence[int],
    new: int,
    threads: int,
    asked: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """What all contestants are asked, as JSON; `exams` with whether the question is known."""
    return {
        "model": str(model),
        "contestants": list(asked),
        "exams": {name: _asked(exam, known) for name, (exam, known) in exams.items()},
        "windows": {length: {"tokens": w.tokens.tolist(), "prefix": w.prefix} for length, w in windows.items()},
        "prompt": list(prompt),
        "new": new,
        "threads": threads,
    }


def _asked(exam: Exam, known: bool) -> list[dict[str, Any]]:
    return [
        {"prompt": list(prompt), "questions": [(q.asked, q.answer) for q in questions]}
        for prompt, questions in exam.asked(known)
    ]


def ask(folder: Path, work: Path, what: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A result a contestant, the dense cache first, as they are measured. Missing without an environment.

    One that takes its process down is told by its last words, and a new process goes on behind it.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        raise Missing(f"no environment at {folder}; --install makes it")
    waiting = ["dense", *(spec["name"] for spec in what["contestants"])]
    while waiting:
        rest = [spec for spec in what["contestants"] if spec["name"] in waiting]
        last = ""
        for found in _run(python, work, {**what, "contestants": rest}):
            last = found.pop("ended", "")
            if not last and found["name"] in waiting:
                waiting.remove(found["name"])
                yield found
        if waiting:
            yield {"name": waiting.pop(0), "error": last or "gave no answer"}


def _run(python: Path, work: Path, what: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What one process answers; how it `ended`, if that was badly."""
    place, log = work / "job.json", work / "peers.log"
    place.write_text(json.dumps(what))
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(what["threads"]))
    environment = {**os.environ, **threads, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [str(python), str(HERE / "run_peers.py"), str(place)]
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True)
        try:
            assert process.stdout is not None
            yield from map(json.loads, process.stdout)
            code = process.wait()
        finally:
            process.kill()
            process.wait()
    if code:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        said = f": {lines[-1][-200:]}" if lines and code > 0 else ""
        yield {"ended": f"its process ended with {code}{said}"}
