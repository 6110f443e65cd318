"""The Triton kernels on one GPU in one call of under 8 minutes: right or not, how fast, and next to what others do.

python benchmarks/gpu.py                              # everything; a JSON under benchmarks/results
python benchmarks/gpu.py --sections products --tune   # one family, every tile tried
python benchmarks/gpu.py --interpret                  # no GPU: all checks at tiny shapes in Triton's interpreter

Every result is compared with one of higher precision before it is timed, by a check that must also refuse a wrong
result; beside a failed check stands no speed. Times are medians of CUDA events with quartiles; entries take turns, and
other memory is read before each, so that none finds its operands in a cache. Bounds come from a copy and a product
measured in the same run. A section that has used up its time leaves the rest out and says so. Packages of others
(gemlite, cut-cross-entropy, liger-kernel) take part where they import.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu.clock import EventClock
    from gpu.contest import Settings

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = {"rows": 30.0, "products": 165.0, "attention": 85.0, "loss": 70.0, "step": 90.0}  # seconds: 440 in all
PACKAGES = ("torch", "triton", "smelt", "gemlite", "liger-kernel", "cut-cross-entropy")


def main() -> int:
    """Print tables and bars, write the JSON; 1 where a kernel of ours fails its check."""
    options = _options()
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported
    start = time.monotonic()
    import torch
    from gpu import report
    from gpu.contest import Settings

    if not options.interpret and not torch.cuda.is_available():
        print("no CUDA device: --interpret runs the checks without one", file=sys.stderr)
        return 2
    torch.manual_seed(options.seed)
    clock = None
    if options.interpret:
        # products of bfloat16 are wrong in the interpreter of triton 3.9
        settings = Settings("cpu", torch.float16, tiny=True, rivals=False)
    else:
        from gpu.clock import EventClock

        settings = Settings("cuda", torch.bfloat16, rivals=not options.no_rivals, tune=options.tune)
        clock = EventClock()
        print("copy {bandwidth:.3g} bytes/s, bf16 product {rate:.3g} operations/s".format(**vars(clock.ceilings)))
    facts: dict[str, Any] = {**_machine(), "sections": {}, "bars": {}}
    if clock is not None:
        facts["ceilings"] = vars(clock.ceilings)
    spare = 0.0
    for name in options.sections.split(","):
        budget = SECTIONS[name] * options.patience + spare
        print(f"\n{name}", flush=True)
        found = facts["sections"][name] = run_section(name, budget, settings, clock, facts["bars"])
        spare = max(0.0, budget - found["seconds"])
        facts["seconds"] = time.monotonic() - start
        if clock is not None:
            _write(options.results, facts)  # what is known so far survives an end from outside
    for name, bar in facts["bars"].items() if clock else ():
        print(report.bar_line(name, bar))
    return int(any(_failed(section) for section in facts["sections"].values()))


def run_section(
    name: str, budget: float, settings: Settings, clock: EventClock | None, bars: dict[str, Any]
) -> dict[str, Any]:
    """Its contests until the seconds are over; those left out stand under `skipped`."""
    from gpu import report
    from gpu.contest import hold, release
    from gpu.limit import OutOfTime

    start, section = time.monotonic(), importlib.import_module(f"gpu.{name}")
    found: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for contest in section.contests(settings):
        try:
            facts = found[contest.name] = hold(contest, clock, budget - (time.monotonic() - start))
        except OutOfTime:
            skipped[contest.name] = f"the section's {budget:.0f} s were over"
            print(f"{contest.name}\n  skipped: {skipped[contest.name]}")
            facts = {}
        else:
            print(report.table(contest.name, facts), flush=True)
            for entry in facts.values():
                if "seconds" in entry:
                    entry["quartiles"] = report.spread(entry["seconds"])
        if contest.bar is not None:
            bars[contest.name] = report.reached(contest.bar, facts)
        release()
    return {"seconds": time.monotonic() - start, "contests": found, "skipped": skipped}


def _failed(section: Mapping[str, Any]) -> bool:
    """Whether an entry of ours failed; a rival's failure is its own."""
    return any(
        "failed" in found
        for contest in section["contests"].values()
        for entry, found in contest.items()
        if entry.startswith("smelt")
    )


def _machine() -> dict[str, Any]:
    """What the numbers depend on."""
    import torch

    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    there = torch.cuda.is_available()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit + (" and changes" if changed else ""),
        "device": torch.cuda.get_device_name() if there else "interpreter",
        "capability": torch.cuda.get_device_capability() if there else None,
        "versions": versions,
    }


def _write(folder: Path, facts: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    place = folder / f"gpu-{device}-{datetime.date.today().isoformat()}.json"
    place.write_text(json.dumps(facts, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ",".join(SECTIONS)
    parser.add_argument("--sections", default=known, help=f"parted by commas; known: {known}")
    parser.add_argument("--interpret", action="store_true", help="all checks on the CPU at tiny shapes; times nothing")
    parser.add_argument("--tune", action="store_true", help="try every tile of every product, not of the first alone")
    parser.add_argument("--no-rivals", action="store_true", help="leave torch and packages out")
    parser.add_argument("--patience", type=float, default=1.0, help="times the seconds that a section may take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the JSON")
    options = parser.parse_args()
    if unknown := set(options.sections.split(",")) - set(SECTIONS):
        parser.error(f"unknown section {min(unknown)}; known: {', '.join(SECTIONS)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
