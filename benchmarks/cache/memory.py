"""Memory of a process that a cache takes: resident bytes with many rows in it, less those when it is gone.

A process of its own, since an allocator keeps what others gave back:  python memory.py ARTEFACT ROWS CONTEXT TARGET
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

import smelt
from smelt.codegen.plan import Target
from smelt.model import Compiled
from smelt.runtime.session import Session

SOURCE = Path(smelt.__file__).resolve().parents[1]
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # glibc gives back what is freed


@dataclass(frozen=True)
class Resident:
    """Bytes: what the process holds for a cache, what the cache says that it allocated and uses, and the formula's."""

    measured: int
    allocated: int
    used: int
    formula: float


def resident(compiled: Compiled, rows: int, context: int, target: Target = "cpp") -> Resident:
    """Of a cache of so many rows that read a prompt of this length."""
    with tempfile.TemporaryDirectory(prefix="smelt-cache-") as work:
        compiled.save(Path(work) / "artefact")
        command = [sys.executable, __file__, str(Path(work) / "artefact"), str(rows), str(context), target]
        path = os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            command, env={**os.environ, **MAPPED, "PYTHONPATH": path}, capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise smelt.SmeltError((done.stderr.strip() or f"ended with {done.returncode}").splitlines()[-1])
    return Resident(**json.loads(done.stdout.splitlines()[-1]))


def _resident() -> int:
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024


@torch.no_grad()
def main() -> None:
    """Print what was measured as JSON."""
    folder, rows, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    compiled = smelt.load(folder, cast("Target", sys.argv[4]))
    plan = compiled.program.cache
    assert plan is not None
    vocabulary = int(compiled.program.facts["vocabulary"])
    tokens = torch.randint(vocabulary, (rows, context), generator=torch.Generator().manual_seed(0)).tolist()
    Session(compiled.plan, rows, context).prefill(tokens)  # loads and builds what stays
    before = _resident()
    session = Session(compiled.plan, rows, context)
    session.prefill(tokens)
    held = session.cache.nbytes()
    cache = session.cache
    del session  # and with it the buffers of its steps
    found = Resident(_resident() - before, held.allocated, held.used, rows * float(plan.bits(context)) / 8)
    del cache
    print(json.dumps(vars(found)))


if __name__ == "__main__":
    main()
