"""Decoding in onnxruntime-genai: finequant exported in style ort, beside that package's own int4 builder.

python benchmarks/cpu.py --install --venvs ~/peers           # once: the environment of onnxruntime-genai, among others
python benchmarks/onnx_genai.py --venvs ~/peers              # a few minutes; most of them are compiling and converting

Same checkpoint, a 430 M parameter Llama of random weights, same prompts, same runtime and threads. The builder stores
groups of 32, rounds activations to int8 and takes 4 bits for the head, which finequant stores in 8. The export is
timed as it comes, with exact activations, and with the builder's rounding (`int8_activations=True`). Each has a process
of its own, stopped while it is not asked; they take turns in every round, and ratios are within a round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cpu
import decode
from peers import report
from peers.bandwidth import read_bandwidth
from peers.engines import HERE, PEERS
from peers.worker import Worker

import smelt

ROOT = Path(__file__).resolve().parents[1]
PEER = PEERS["onnxruntime-genai"]
BUILDER = "builder"
OURS: dict[str, dict[str, Any]] = {"smelt": {}, "smelt int8": {"int8_activations": True}}


def main() -> None:
    """Print what was measured and write it down."""
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    machine = cpu._machine(options.threads)
    folders = {name: export(options, name) for name in OURS} | {BUILDER: convert(options)}
    found: dict[str, dict[str, Any]] = {name: {"bytes": model_bytes(folder)} for name, folder in folders.items()}
    samples, bandwidth, versions = race(options, folders)
    for name, taken in samples.items():
        found[name] |= taken
    ratios = {
        name: {
            metric: report.spread([a / b for a, b in zip(found[name][metric], found[BUILDER][metric], strict=True)])
            for metric in ("decode", "prefill")
        }
        | {"bytes": found[name]["bytes"] / found[BUILDER]["bytes"]}
        for name in OURS
    }
    for name, facts in found.items():
        low, median, high = report.spread(facts["decode"])
        read, size = report.spread(facts["prefill"])[1], facts["bytes"] / 1e6
        print(f"{name}: {median:.1f} tokens/s decoded ({low:.1f} to {high:.1f}), {read:.0f} read, {size:.0f} MB")
    for name, ratio in ratios.items():
        low, median, high = ratio["decode"]
        print(f"{name} decodes × {median:.3f} as fast as the builder's ({low:.3f} to {high:.3f})")
    options.results.mkdir(parents=True, exist_ok=True)
    shape = {"prompt_tokens": options.prompt_tokens, "new_tokens": options.new_tokens, "rounds": options.rounds}
    whole = {**machine, "versions": versions, **shape, "bandwidth": bandwidth, "engines": found, "ratios": ratios}
    place = options.results / f"onnx-{machine['date'][:10]}.json"
    place.write_text(json.dumps(whole, indent=1) + "\n")


def export(options: argparse.Namespace, name: str) -> Path:
    """The folder of an export, made unless it is there; the checkpoint is compiled once for all."""
    folder: Path = options.work / name.replace(" ", "-")
    if not folder.exists():
        artefact = options.artefact or options.work / "finequant.smelt"
        if not artefact.exists():
            decode.checkpoint(options.checkpoint)
            smelt.compile(options.checkpoint, "finequant").save(artefact)
        smelt.load(artefact).export_onnx(folder, "ort", check=False, **OURS[name])
    return folder


def convert(options: argparse.Namespace) -> Path:
    """The folder that the package's own builder makes."""
    folder: Path = options.builder or options.work / BUILDER
    if not folder.exists():
        decode.checkpoint(options.checkpoint)
        with _worker(options, BUILDER) as worker:
            request = {"checkpoint": str(options.checkpoint), "out": str(folder), "variant": "int4"}
            worker.ask("convert", **request, threads=options.threads)
    return folder


def race(
    options: argparse.Namespace, folders: dict[str, Path]
) -> tuple[dict[str, dict[str, list[float]]], list[float], dict[str, str]]:
    """Tokens a second by metric, one of each round; the machine's bandwidth at both ends; the runtime's versions."""
    samples: dict[str, dict[str, list[float]]] = {name: {"decode": [], "prefill": []} for name in folders}
    source, names = random.Random(time.time_ns()), list(folders)
    total, new = options.prompt_tokens + options.new_tokens, options.new_tokens
    bandwidth = [read_bandwidth(options.threads, options.work)]
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(_worker(options, name)) for name in names}
        for name, worker in workers.items():
            request = {"model": str(folders[name]), "variant": "int4", "context": total}
            versions = worker.ask("load", **request, threads=options.threads)["versions"]
            worker.ask("run", tokens=[1] * options.prompt_tokens, new=new)
        for number in range(options.rounds):
            prompt = [source.randrange(1, decode.VOCABULARY) for _ in range(options.prompt_tokens)]
            for name in names[number % len(names) :] + names[: number % len(names)]:
                reply = workers[name].ask("run", tokens=prompt, new=new)
                samples[name]["decode"].append((new - 1) / reply["decode_s"])
                samples[name]["prefill"].append(len(prompt) / reply["prefill_s"])
    return samples, [*bandwidth, read_bandwidth(options.threads, options.work)], versions


def model_bytes(folder: Path) -> int:
    """Of the graph and its weights; tokenizers are not compared."""
    return sum(path.stat().st_size for path in folder.glob("model.onnx*"))


def _worker(options: argparse.Namespace, name: str) -> Worker:
    log = options.work / f"{name.replace(' ', '-')}.log"
    environment = PEER.environment(options.threads, options.work)
    return Worker(PEER.python(options.venvs), HERE / PEER.script, log, environment)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    work = Path(tempfile.gettempdir())
    parser.add_argument("--checkpoint", type=Path, default=work / "smelt-llama-430m", help="kept between runs")
    parser.add_argument("--work", type=Path, default=work / "smelt-onnx-benchmark", help="exports, kept; 1.5 GB")
    parser.add_argument("--artefact", type=Path, help="one of finequant on the checkpoint, where there is one")
    parser.add_argument("--builder", type=Path, help="a folder that the builder has made of the checkpoint")
    parser.add_argument("--venvs", type=Path, default=work / "smelt-cpu-benchmark" / "venvs")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=65, help="the first is not timed")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the JSON")
    options = parser.parse_args()
    if not PEER.python(options.venvs).exists():
        sys.exit(f"no environment at {options.venvs / str(PEER.venv)}; benchmarks/cpu.py --install makes it")
    return options


if __name__ == "__main__":
    main()
