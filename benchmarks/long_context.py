"""Decodes behind a long context with a 430 M parameter Llama of random weights, by cache: bf16, 4 bits, partial reads.

python benchmarks/long_context.py                       # 16384 tokens, about 5 GB of disk and some minutes
python benchmarks/long_context.py --caches bf16 quest --context 4096 --rounds 5

One artefact (w4a8) whose cache is stored in several ways; the caches hold random keys and values, are all in memory and
take turns within one run. What is printed are medians, and ratios to the first cache round by round. On random keys no
token matters more than another: this is about time, quality is measured by benchmarks/cache.py.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from decode import checkpoint

import smelt
from smelt.codegen.build import threads
from smelt.ir.program import Program
from smelt.model import Compiled
from smelt.passes import catalogue
from smelt.recipes import load
from smelt.runtime.session import Draw, Session

ROOT = Path(__file__).resolve().parents[1]
STEPS = 16  # of a round


def affine(axis: str, group: int) -> dict[str, Any]:
    """Four bits in groups along an axis."""
    return {"affine": {"bits": 4, "axis": axis, "group": group, "zero": True}}


def encoded(group: int) -> list[dict[str, Any]]:
    """A cache of four bits with scales for so many numbers."""
    pages = {"sink": 4, "tail": 64, "page": 64}
    return [{"cache.encode": {"keys": affine("channel", group), "values": affine("token", group), **pages}}]


CACHES: Mapping[str, Sequence[dict[str, Any]]] = {
    "bf16": [],
    "4 bits, groups of 32": encoded(32),
    "4 bits, groups of 64": encoded(64),
    "quest": [{"cache.retrieve": {"by": "pages", "budget": 1024, "page": 16}}],
    "tokenselect": [{"cache.retrieve": {"by": "scan", "budget": 1024, "dense_layers": 0, "page": 16}}],
    "tidaldecode": [{"cache.retrieve": {"by": "reuse", "budget": 1024, "layers": [2, 12], "page": 16}}],
}


def main() -> None:
    """Print and write down what was measured."""
    asked = _options()
    artefact = asked.folder / "w4a8.smelt"
    if not artefact.exists():
        checkpoint(asked.folder / "model")
        smelt.compile(asked.folder / "model", "w4a8").save(artefact)
    lm = smelt.load(artefact)
    lm.program.facts["context"] = asked.context + 1024
    sessions = {name: filled(lm, CACHES[name], asked.context) for name in asked.caches}
    rates: dict[str, list[float]] = {name: [] for name in sessions}
    for session in sessions.values():
        rate(session)
    for _ in range(asked.rounds):
        for name, session in sessions.items():
            rates[name].append(rate(session))
    rows = {name: summary(sessions[name], found, rates[asked.caches[0]]) for name, found in rates.items()}
    for name, row in rows.items():
        low, mid, high = row["ratio"]
        sizes = f"{row['tokens_per_second']:6.1f} tokens/s  {row['cache_mb']:6.1f} MB"
        print(f"{name:22s} {sizes}  x{mid:.2f} ({low:.2f} to {high:.2f})")
    told = {"date": datetime.date.today().isoformat(), "context": asked.context, "threads": threads()}
    told |= {"machine": platform.processor() or platform.machine(), "torch": torch.__version__, "rows": rows}
    place = ROOT / "benchmarks" / "results" / f"long-context-{told['date']}.json"
    place.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def filled(lm: Compiled, steps: Sequence[dict[str, Any]], context: int) -> Session:
    """A session whose cache, changed by these steps, holds random keys and values of a context."""
    program = lm.program.fork()
    _changed(program, steps)
    session = Session(Compiled(program, lm.facts, lm.assets).plan, 1, context + 1024)
    cache, random, at = session.cache, torch.Generator().manual_seed(0), 0
    while at < context:
        new = min(2048, context - at)
        cache.begin(torch.arange(at, at + new)[None])
        for site in cache.plan.sites:
            shapes = (1, site.kv_heads, new, site.key_dim), (1, site.kv_heads, new, site.value_dim)
            cache.append(site.layer, *(torch.randn(shape, generator=random) for shape in shapes))
        cache.commit([list(range(new))])
        at += new
    cache.end_prefill()
    return session


def _changed(program: Program, steps: Sequence[dict[str, Any]]) -> None:
    assert program.cache is not None
    sites = (replace(site, dense="bfloat16") for site in program.cache.sites)
    program.cache = replace(program.cache, sites=tuple(sites))
    recipe = load({"name": "tried", "family": "cache", "does": "x", "steps": [*steps] or ["cache.insert"]}, catalogue())
    for step in recipe.steps if steps else ():
        if unmet := list(step.pass_.requires(program)):
            raise SystemExit("; ".join(unmet))
        step.pass_.apply(program, None)


def rate(session: Session) -> float:
    """Tokens a second of some greedy steps."""
    draw, done, start = Draw(0, 0.0, torch.zeros(1, dtype=torch.int64)), 0, time.perf_counter()
    while done < STEPS:
        for _ in session.chain([5], [True], min(STEPS - done, *session.cache.room()), draw):
            done += 1
    return done / (time.perf_counter() - start)


def summary(session: Session, rates: Sequence[float], first: Sequence[float]) -> dict[str, Any]:
    """A row of the result."""
    ratios = [a / b for a, b in zip(rates, first, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return {
        "tokens_per_second": statistics.median(rates),
        "cache_mb": session.cache.nbytes().used / 1e6,
        "ratio": [quartiles[0], statistics.median(ratios), quartiles[2]],
        "rounds": list(rates),
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "long-context", help="model and artefact")
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--caches", nargs="+", choices=list(CACHES), default=list(CACHES))
    parser.add_argument("--rounds", type=int, default=9)
    return parser.parse_args()


if __name__ == "__main__":
    main()
