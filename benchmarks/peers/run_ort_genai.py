"""onnxruntime-genai as an engine of the side-by-side benchmark: the weights in int4, by its own model builder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serve import Clock, Run, serve
from tokenizer import beside_links


def convert(checkpoint: Path, out: Path, variant: str, threads: int) -> dict[str, Any]:
    """Groups of 32, and integer products (accuracy level 4), which are the fastest that it has for a CPU."""
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as work:
        source, cache = Path(work) / "source", Path(work) / "cache"
        source.mkdir()
        beside_links(checkpoint, source)
        subprocess.run(
            [
                *(sys.executable, "-m", "onnxruntime_genai.models.builder"),
                *("-i", source, "-o", out, "-p", variant, "-e", "cpu", "-c", cache),
                *("--extra_options", "int4_block_size=32", "int4_accuracy_level=4"),
            ],
            check=True,
        )
    whole = sum(path.stat().st_size for path in out.glob("*.onnx*"))
    return {"bytes": whole, "read_bytes": whole - _embedding_bytes(out / "model.onnx")}


def load(model: Path, variant: str, threads: int, context: int) -> tuple[Run, dict[str, Any]]:
    """A generator a request: it holds the cache."""
    import numpy
    import onnxruntime_genai as genai

    config = genai.Config(str(model))
    session = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    lm = genai.Model(config)

    def run(tokens: Sequence[int], new: int) -> dict[str, Any]:
        clock = Clock()
        options, length = genai.GeneratorParams(lm), len(tokens) + new
        options.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = genai.Generator(lm, options)
        generator.append_tokens(numpy.array([list(tokens)], dtype=numpy.int32))
        for _ in range(new):
            generator.generate_next_token()
            clock.tick(generator.get_next_tokens()[0])
        return clock.reply()

    return run, {}


def _embedding_bytes(model: Path) -> int:
    """Of the table that a step reads one row of."""
    import onnx

    graph = onnx.load(model, load_external_data=False).graph
    tables = [tensor for tensor in graph.initializer if "embed_tokens" in tensor.name]
    return sum(int(entry.value) for table in tables for entry in table.external_data if entry.key == "length")


if __name__ == "__main__":
    serve(convert, load, ("onnxruntime-genai", "onnxruntime"))
