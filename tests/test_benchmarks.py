"""The benchmarks run, write what they measured, and touch nothing else. Their numbers are nobody's test."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from smelt.ir.errors import SmeltError

from . import tiny

ROOT = Path(__file__).parents[1]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, *words: object) -> str:
    command = [sys.executable, ROOT / "benchmarks" / f"{name}.py", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quality_makes_a_row_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(tiny.tokens(600))
    said = run(
        "quality", "--model", tiny.model(), "--recipes", "none", "finequant",
        "--text", tmp_path / "text.txt", "--results", tmp_path / "results",
    )  # fmt: skip
    assert [line.split(" | ")[0] for line in said.splitlines()[2:]] == ["| none", "| finequant"]
    (written,) = (tmp_path / "results").glob("quality-*.json")
    rows = json.loads(written.read_text())["rows"]
    assert rows["none"]["bits_per_weight"] == pytest.approx(32, rel=1e-6)
    assert 4 < rows["finequant"]["bits_per_weight"] < 12


def test_the_table_goes_between_its_marks(tmp_path: Path) -> None:
    quality = script("quality")
    readme = tmp_path / "README.md"
    begin, end = (mark.format("quality") for mark in quality.MARKS)
    readme.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    for block in ("| new |", "| newer |"):
        quality.write_between(readme, block)
        assert readme.read_text() == f"before\n{begin}\n{block}\n{end}\nafter\n"
    readme.write_text("no marks")
    with pytest.raises(SystemExit, match="marks"):
        quality.write_between(readme, "x")
    assert readme.read_text() == "no marks"


def test_a_failed_recipe_has_a_row() -> None:
    assert script("quality").markdown({"x": {"error": "cannot"}}).splitlines()[-1] == "| x | cannot |"


def test_the_large_model_is_as_large_as_it_says() -> None:
    shards = list(script("decode")._shards())
    values = [sum(int.__mul__(*shape) if len(shape) == 2 else shape[0] for shape in shard.values()) for shard in shards]
    assert 425e6 < sum(values) < 435e6
    assert max(values) < sum(values) / 10  # never much in memory at once


def test_decode_races_on_a_small_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [
        "--folder",
        tiny.model(),
        "--recipe",
        "none",
        "--results",
        tmp_path,
        "--prompt-tokens",
        8,
        "--new-tokens",
        4,
    ]
    said = run("decode", *words, "--rounds", 1)
    assert "smelt decodes ×" in said and "of the checkpoint" in said
    (written,) = tmp_path.glob("decode-none-*.json")
    assert json.loads(written.read_text())["peak_bytes_of_compiling"] > 0


def test_a_widened_model_answers_as_it_did(tmp_path: Path) -> None:
    """Neurons twice and four times, heads twice, a layer that adds nothing behind each; a wrong divisor is seen."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    wide, source = script("widened"), tiny.write_model(tmp_path / "model")
    held = load_file(source / "model.safetensors")
    save_file({name: value.half().float() for name, value in held.items()}, source / "model.safetensors")
    shape = wide.Shape(hidden=128, layers=4, heads=16, kv_heads=4, intermediate=384)
    ids = torch.arange(48)[None] * 7

    def logits(folder: Path) -> torch.Tensor:
        with torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            return model(ids).logits

    wide.widened(source, tmp_path / "wide", shape)
    want = logits(source)
    assert (logits(tmp_path / "wide") - want).abs().max() < 1e-4 * want.abs().max()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wide, "_reading", lambda weight, columns: weight[:, columns])
        wide.widened(source, tmp_path / "wrong", shape)
    assert (logits(tmp_path / "wrong") - want).abs().max() > 0.1 * want.abs().max()
    with pytest.raises(SmeltError, match="257 do not hold each of 64 a power of two times"):
        wide.widened(source, tmp_path / "none", shape._replace(hidden=257))
