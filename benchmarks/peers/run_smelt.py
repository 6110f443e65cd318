"""smelt as an engine of the side-by-side benchmark. A variant is a recipe: a name or a file, and options to set.

`finequant`, `./mine.yaml`, `finequant:weights.quantize.bits=8`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serve import Run, serve


def convert(checkpoint: Path, out: Path, variant: str, threads: int) -> dict[str, Any]:
    """Compile and save. The token embedding is encoded too, but a step reads one row of it."""
    import smelt

    recipe, *overrides = variant.split(":")
    compiled = smelt.compile(str(checkpoint), recipe, overrides=overrides)
    shutil.rmtree(out, ignore_errors=True)
    compiled.save(out)
    program = compiled.program
    looked_up = [weight.nbytes for name, weight in program.weights.items() if "embed" in name]
    return {"bytes": program.nbytes, "read_bytes": program.nbytes - sum(looked_up)}


def load(model: Path, variant: str, threads: int, context: int) -> tuple[Run, dict[str, Any]]:
    """Read the artefact; nothing of the model's source is needed."""
    import smelt

    compiled = smelt.load(model)

    def run(tokens: Sequence[int], new: int) -> dict[str, Any]:
        done = compiled.complete([list(tokens)], max_new_tokens=new, eos=())
        return {"prefill_s": done.prefill_seconds, "decode_s": done.decode_seconds, "tokens": done.rows[0].tokens}

    return run, {}


if __name__ == "__main__":
    serve(convert, load, ("torch",))
