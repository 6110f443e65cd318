"""Compiles a model by every shipped recipe and measures what each costs and keeps: the table in the README.

python benchmarks/quality.py                          # all recipes on the bundled model
python benchmarks/quality.py --recipes none finequant --text heldout.txt
python benchmarks/quality.py --caches                 # recipes of the cache alone, behind longer prompts
python benchmarks/quality.py --write-readme
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import smelt
from smelt.codegen.build import threads
from smelt.quality import Meter, Source
from smelt.recipes import shipped
from smelt.texts import Text, held_out_text, training_texts

ROOT = Path(__file__).resolve().parents[1]
CALIBRATION = 200_000  # bytes of the standard library, about 60 thousand tokens
MARKS = "<!-- {}:begin -->", "<!-- {}:end -->"
CACHE_FAMILIES = ("cache", "attention")


def megabytes(count: float) -> str:
    """`11.8` of 11,841,657 bytes."""
    return f"{count / 1e6:.1f}"


COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {  # header: metric, and how it is shown; the JSON holds more
    "bits a weight": ("bits_per_weight", "{:.2f}".format),
    "parameters": ("parameters_ratio", "{:.0%}".format),
    "bits a cached value": ("measured_bits_per_value", "{:.2f}".format),
    "MB on disk": ("disk_bytes", megabytes),
    "MB in memory": ("memory_bytes", megabytes),
    "perplexity": ("perplexity", "{:.2f}".format),
    "KL": ("replay_kl", "{:.2g}".format),
    "same top-1": ("top1", "{:.1%}".format),
    "tokens a step": ("tokens_per_step", "{:.2f}".format),
    "sampled": ("tokens_per_step_sampled", "{:.2f}".format),
    "tokens a second": ("tokens_per_second", "{:.0f}".format),
    "lossless": ("lossless", lambda value: "yes" if value else "**no**"),
}


CACHES: dict[str, tuple[str, Callable[[float], str]]] = {
    "bits a cached value": ("measured_bits_per_value", "{:.2f}".format),
    "perplexity": ("far_perplexity_ratio", lambda value: f"{value - 1:+.2%}"),
    "KL": ("far_kl", "{:.2g}".format),
    "same top-1": ("far_top1", "{:.1%}".format),
}


def main() -> int:
    """The exit code is 1 if a recipe does not compile."""
    options = _options()
    calibration = [options.calibration.read_text()] if options.calibration else training_texts(CALIBRATION)
    plain = smelt.compile(options.model, "none")
    held_out = options.text.read_text() if options.text else held_out_text()
    text = Text(plain.tokenizer.encode(held_out), int(plain.program.facts["vocabulary"]), plain.context)
    source = Source(plain, text)
    rows: dict[str, dict[str, Any]] = {}
    columns, block = (CACHES, "caches") if options.caches else (COLUMNS, "quality")
    metrics = [metric for metric, _ in CACHES.values()] if options.caches else None
    for name in options.recipes or _shipped(options.caches):
        print(f"{name} …", file=sys.stderr, flush=True)
        rows[name] = _row(options.model, name, calibration, source, metrics)
    table = markdown(rows, columns)
    print(table)
    results = {"date": datetime.date.today().isoformat(), "model": Path(options.model).name, **_machine(), "rows": rows}
    options.results.mkdir(parents=True, exist_ok=True)
    place = options.results / f"{block}-{results['date']}.json"
    place.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {place}", file=sys.stderr)
    if options.write_readme:
        caption = "" if options.caches else "\n\n" + _caption(results)
        write_between(ROOT / "README.md", table + caption, block)
    return int(any("error" in row for row in rows.values()))


def _shipped(caches: bool) -> list[str]:
    """Recipes of the cache, or all others."""
    return [header.name for header in shipped() if (header.family in CACHE_FAMILIES) == caches]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(smelt.reference_model()), help="folder of a transformers model")
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help="default: all that ship but those of caches")
    parser.add_argument("--caches", action="store_true", help="the recipes of caches, measured behind longer prompts")
    parser.add_argument("--text", type=Path, help="held-out text; default: files of the standard library")
    parser.add_argument("--calibration", type=Path, help="text to calibrate and train on; default likewise")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the JSON")
    parser.add_argument("--write-readme", action="store_true", help="replace the table in the README")
    return parser.parse_args()


def _row(
    model: str, recipe: str, calibration: Sequence[str], source: Source, metrics: Sequence[str] | None = None
) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        compiled = source.compiled if recipe == "none" else smelt.compile(model, recipe, calibration=calibration)
    except smelt.SmeltError as fault:
        return {"error": str(fault)}
    compiled_in = time.perf_counter() - start
    meter = Meter(compiled, source.text, source)
    found = meter.all() if metrics is None else {metric: meter[metric] for metric in metrics}
    return {**found, "compile_seconds": compiled_in}


def markdown(
    rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, tuple[str, Callable[[float], str]]] = COLUMNS
) -> str:
    """The table in Markdown, a row a recipe; a recipe that failed says why."""
    lines = [f"| recipe | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for name, row in rows.items():
        failed = row.get("error")
        cells = [failed] if failed else [show(row[metric]) for metric, show in columns.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_between(path: Path, text: str, block: str = "quality") -> None:
    """Replace what stands between the two marks of a block of a file."""
    first, last = (mark.format(block) for mark in MARKS)
    before, begin, rest = path.read_text().partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise SystemExit(f"{path} lacks the marks {first} and {last}")
    path.write_text(f"{before}{first}\n{text}\n{last}{after}")


def _machine() -> dict[str, Any]:
    return {
        "cpu": _cpu(),
        "threads": threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "smelt": smelt.__version__,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _caption(results: Mapping[str, Any]) -> str:
    return (
        f"Measured on {results['date']} with {results['threads']} threads of {results['cpu']}, Python "
        f"{results['python']}, torch {results['torch']}, by `python benchmarks/quality.py`. Perplexity, KL and top-1: "
        "held-out files of the standard library, replayed token by token through the compiled kernels and the real "
        "cache. Memory: the weights and a cache of 1024 tokens. Tokens a step: greedy, then at temperature 1. Tokens a "
        "second are those of one small model on one machine: compare them within the table only."
    )


if __name__ == "__main__":
    raise SystemExit(main())
