"""Replay: a refactoring that must not change kernels generates the same sources for a stored set of graphs.

SMELT_BLESS=1 python -m pytest tests/codegen/test_replay.py     # rewrites replay.json; read its diff
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from smelt.codegen.lower import lower
from smelt.ir.encoding import Affine, Dense
from smelt.ir.program import Program
from smelt.passes.activations.quantize import Quantize

from ..ir.programs import cached, captured, quantized

STORED = Path(__file__).with_name("replay.json")


def integers(program: Program) -> Program:
    Quantize(group=32).apply(program, None)
    return program


GRAPHS: dict[str, Callable[[], Program]] = {
    "llama.float32": lambda: cached(captured("llama")),
    "llama.bfloat16": lambda: cached(quantized(captured("llama"), Dense("bfloat16")), dense="bfloat16"),
    "llama.affine4": lambda: cached(quantized(captured("llama"), Affine(4, 32))),
    "llama.affine4.int8": lambda: cached(integers(quantized(captured("llama"), Affine(4, 32)))),
    "llama.kivi": lambda: cached(
        captured("llama"), sink=4, tail=32, page=32, keys=Affine(8, 32, "channel", True), values=Affine(8, 16)
    ),
    "gpt2.affine8.zero": lambda: cached(quantized(captured("gpt2"), Affine(8, 0, zero=True))),
    "mixtral.affine2": lambda: cached(quantized(captured("mixtral"), Affine(2, 32))),
}


def digests(program: Program) -> dict[str, str]:
    """A hash of each kernel's source, by kernel and the first node that it runs."""
    found: dict[str, str] = {}
    for row in lower(program).kernels():
        digest = hashlib.sha256(row["source"].encode()).hexdigest()[:16]
        if digest not in found.values():
            found[f"{row['node']}: {row['kernel']}"] = digest
    return found


@pytest.mark.parametrize("name", GRAPHS)
def test_generates_the_same_sources(name: str) -> None:
    made = digests(GRAPHS[name]())
    told = json.loads(STORED.read_text()) if STORED.exists() else {}
    if os.environ.get("SMELT_BLESS"):
        STORED.write_text(json.dumps({**told, name: made}, indent=1, sort_keys=True) + "\n")
        return
    assert made == told[name], "kernels changed: if they were meant to, rewrite replay.json as this file's head says"


def test_another_encoding_generates_another_source() -> None:
    assert digests(GRAPHS["llama.affine4"]()) != digests(GRAPHS["llama.affine4.int8"]())
