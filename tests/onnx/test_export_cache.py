"""A cache with pages inside an exported graph: read, selected, encoded and stored as the interpreter does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smelt.ir.cache import Select
from smelt.ir.encoding import Affine

from .cached_steps import beside, decoder

pytest.importorskip("onnxruntime", reason="runs what is exported in onnxruntime")

BAR = 1e-3
HALVES = 1e-2  # the model itself moves by 3e-3 when its norm weights change by 1e-6: the last bit of a sum turns codes
KEYS, VALUES = Affine(4, 8, "channel", True), Affine(4, 32, zero=True)
SITES: dict[str, dict[str, Any]] = {
    "whole": {},
    "whole in halves": {"dense": "float16"},
    "coded": {"sink": 2, "tail": 16, "page": 16, "keys": KEYS, "values": VALUES},
    "symmetric": {"tail": 8, "page": 8, "keys": Affine(8, 8, "channel"), "values": Affine(4, 0, scale="float32")},
    "halves": {"dense": "float16", "tail": 8, "page": 8, "keys": KEYS, "values": VALUES},
    "recent": {"sink": 2, "tail": 8, "page": 16, "keys": KEYS, "select": Select("recency", 0.5)},
    "norm": {"tail": 8, "page": 16, "keys": KEYS, "values": VALUES, "select": Select("key_norm", 0.5)},
    "budget": {"sink": 1, "tail": 8, "page": 8, "values": VALUES, "select": Select("key_norm", 1.0, 16)},
    "stream": {"sink": 4, "tail": 10, "page": 5, "select": Select("recency", budget=0)},
    "one": {"tail": 0, "page": 1, "values": Affine(8, 16)},
}


@pytest.mark.parametrize("site", SITES)
def test_reads_what_the_interpreter_reads(site: str, tmp_path: Path) -> None:
    program = decoder("qwen3", **SITES[site])
    run = beside(program, program, tmp_path / "out")
    assert run.worst < (HALVES if SITES[site].get("dense") == "float16" else BAR)
    assert run.cache is not None and run.loop is not None
    assert run.loop.state["past.lengths"].tolist() == run.cache.lengths


@pytest.mark.parametrize("site", ["coded", "norm", "budget"])
def test_a_window_and_a_softcap_are_kept_over_pages(site: str, tmp_path: Path) -> None:
    program = decoder("gemma2", **SITES[site])
    assert beside(program, program, tmp_path / "out", steps=8).worst < BAR


def test_attention_sinks_have_their_share(tmp_path: Path) -> None:
    program = decoder("granite_swa", sink=2, tail=8, page=16, values=Affine(8, 16))
    assert beside(program, program, tmp_path / "out", steps=6).worst < BAR


@pytest.mark.parametrize("site", ["coded", "norm", "halves"])
def test_pages_are_stored_in_the_programs_own_bytes(site: str, tmp_path: Path) -> None:
    program = decoder("qwen3", **SITES[site])
    run = beside(program, program, tmp_path / "out")
    assert run.cache is not None and run.loop is not None
    for layer, segments in run.cache.segments.items():
        (body,) = segments.bodies
        for row in range(3):
            pages = int(body.host_held[row, 0])
            slots = body.host_table[row, :, :pages].long()
            for role, parts in (("keys", body.keys), ("values", body.values)):
                for part, value in parts.items() if pages else ():
                    theirs = run.loop.state[f"past.{layer}.{role}.{part}"][row, :pages]
                    ours = value[slots].transpose(0, 1).numpy()
                    close = np.isclose(theirs, ours, rtol=1e-5, atol=0) if ours.dtype == np.float32 else theirs == ours
                    assert close.mean() > 0.8 and (part != "codes" or close.mean() > 0.99)  # the last bit turns some


def test_memory_does_not_grow(tmp_path: Path) -> None:
    program = decoder("qwen3", **SITES["norm"])
    run = beside(program, program, tmp_path / "out", lengths=(3,), steps=2)
    assert run.loop is not None
    before = {name: value.shape for name, value in run.loop.state.items()}
    run.loop.capacity, size = 128, run.loop.nbytes
    for _ in range(10):
        run.loop.step([1])
    assert {name: value.shape for name, value in run.loop.state.items()} == before and run.loop.nbytes == size


MUTANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "another score": ("norm", {"select": Select("recency", 0.5)}),
    "more bits": ("coded", {"values": Affine(8, 32, zero=True)}),
    "no sinks": ("stream", {"sink": 0}),
    "a longer tail": ("stream", {"tail": 15}),
    "a larger budget": ("budget", {"select": Select("key_norm", 1.0, 24)}),
    "an older half": ("recent", {"keys": None, "select": Select("recency", 0.75)}),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_comparison_sees_a_wrong_cache(mutant: str, tmp_path: Path) -> None:
    site, change = MUTANTS[mutant]
    wrong, right = decoder("qwen3", **SITES[site] | change), decoder("qwen3", **SITES[site])
    assert beside(wrong, right, tmp_path / "out").worst > 2 * BAR


def test_the_reference_evaluator_says_the_same(tmp_path: Path) -> None:
    from onnx.reference import ReferenceEvaluator

    program = decoder("qwen3", **SITES["norm"])
    run = beside(program, program, tmp_path / "out", lengths=(1, 30), steps=1)
    assert run.loop is not None
    run.loop.capacity += 3  # its buffers have room for pages of as many tokens
    evaluator = ReferenceEvaluator(str(tmp_path / "out" / "model.onnx"))
    for _ in range(3):
        given = {"tokens": np.array([[5], [7]]), "counts": np.array([1, 1]), **run.loop.state}
        theirs = dict(zip(evaluator.output_names, evaluator.run(None, given), strict=True))
        found = run.loop.step([5, 7])
        assert np.abs(theirs["logits"][:, 0] - found["logits"]).max() < 1e-4
        for name, value in run.loop.state.items():
            other = theirs[name.replace("past", "present", 1)]
            assert other.dtype == value.dtype and np.isclose(other, value, rtol=1e-4, atol=1e-5).mean() > 0.98
