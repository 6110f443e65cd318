"""What does not export says so, names the place and the way out, and leaves nothing behind."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import sympy
import torch
from typer.testing import CliRunner

import smelt
import smelt.export
from smelt.cli import app
from smelt.codegen.onnx import export
from smelt.ir.encoding.base import Encoding, Parts
from smelt.ir.errors import SmeltError
from smelt.ir.shapes import derive
from smelt.ir.weight import Weight
from smelt.passes.sample.superposed import Superposed

from .. import tiny
from ..ir.programs import affine_layer, captured, one_call
from .cached_steps import decoder

onnx = pytest.importorskip("onnx", reason="writes ONNX files")


@dataclass(frozen=True)
class Doubled(Encoding):
    """Half of every value: an encoding that ONNX does not know."""

    name: ClassVar[str] = "doubled"

    def encode(self, x: torch.Tensor, tables: Parts | None = None) -> dict[str, torch.Tensor]:
        return {"half": x / 2}

    def decode(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return (parts["half"] * 2).to(dtype)

    def stored_bits(self, shape: tuple[Any, ...]) -> sympy.Expr:
        return 32 * sympy.prod(shape)

    def expr(self, shape: tuple[Any, ...]) -> Any:
        raise NotImplementedError

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        return None


def test_an_unknown_style_is_named(tmp_path: Path) -> None:
    with pytest.raises(SmeltError, match=r"unknown style 'standart' \(did you mean 'standard'\?\)"):
        export(affine_layer(), tmp_path / "out", "standart")
    with pytest.raises(SmeltError, match="takes no such option"):
        export(affine_layer(), tmp_path / "out", wide=True)


def test_an_encoding_that_onnx_cannot_say_is_refused_or_decoded(tmp_path: Path) -> None:
    program = affine_layer()
    program.weights["layer.weight"] = program.weights["layer.weight"].encoded(Doubled())
    with pytest.raises(SmeltError, match=r"'layer.weight' is stored as .*ONNX cannot say; the nearest.*affine\(bits=4"):
        export(program, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    done = export(program, tmp_path / "out", allow_decoded=True)
    assert any("written decoded" in note for note in done.notes)
    stored = onnx.load(tmp_path / "out" / "model.onnx").graph.initializer
    assert any(tensor.data_type == onnx.TensorProto.FLOAT and list(tensor.dims) == [4, 3] for tensor in stored)


def test_a_cache_that_onnx_cannot_encode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SmeltError, match=r"keys of layer 0 are stored as .*; the nearest that exports is affine"):
        export(decoder("qwen3", tail=8, page=8, keys=Doubled()), tmp_path / "out")
    with pytest.raises(SmeltError, match="bfloat16"):
        export(decoder("qwen3", dense="bfloat16"), tmp_path / "out")


def test_inputs_that_a_search_writes_are_refused_in_every_style(tmp_path: Path) -> None:
    program = decoder("qwen3")
    Superposed(drafts=2, alpha=0.0).apply(program, None)
    derive(program)
    for style in ("standard", "ort"):
        with pytest.raises(SmeltError, match=r"beside_1.*compile without the step.*sample.superposed.*with smelt"):
            export(program, tmp_path / "out", style)


def test_an_op_without_form_is_named(tmp_path: Path) -> None:
    program = one_call(torch.ops.aten.digamma.default, {"x": ("B", 3)}, "$x")
    with pytest.raises(SmeltError, match=r"%\w+ calls aten.digamma.default, which has no ONNX form"):
        export(program, tmp_path / "out")


def test_a_folder_of_something_else_stays(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SmeltError, match="exists and is not an export of smelt"):
        export(affine_layer(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_export_replaces_one_and_a_failure_leaves_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(affine_layer(), out)
    before = (out / "model.onnx").read_bytes()
    with pytest.raises(SmeltError):
        export(one_call(torch.ops.aten.digamma.default, {"x": ("B", 3)}, "$x"), out)

    def stop(draft: Path, told: Any) -> Any:
        raise SmeltError("no")

    with pytest.raises(SmeltError, match="no"):
        export(one_call(torch.ops.aten.relu.default, {"x": ("B", 3)}, "$x"), out, accept=stop)
    assert (out / "model.onnx").read_bytes() == before
    export(one_call(torch.ops.aten.relu.default, {"x": ("B", 3)}, "$x"), out)
    assert (out / "model.onnx").read_bytes() != before and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SmeltError, match="cannot be written"):
        export(affine_layer(), tmp_path / "file" / "out")


def test_large_weights_lie_beside_the_model_and_are_hashed(tmp_path: Path) -> None:
    program = captured("llama")
    done = export(program, tmp_path / "out")
    told = json.loads((tmp_path / "out" / "smelt.json").read_text())
    assert set(told["files"]) == {"model.onnx", "model.onnx.data"}
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size > (tmp_path / "out" / "model.onnx").stat().st_size
    assert done.nbytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    shared = dict(program.weights)
    shared["lm_head.weight"] = Weight.of(torch.ones(3))
    assert told["weight_bytes"] <= program.nbytes * 1.01


def test_without_onnxruntime_the_result_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = smelt.export.importlib.util.find_spec
    monkeypatch.setattr(
        smelt.export.importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else found(name)
    )
    done = smelt.load(tiny.artefact(), target="torch").export_onnx(tmp_path / "out")
    assert done.unchecked is not None and "not checked: onnxruntime is not installed" in str(done)
    assert "unchecked" in json.loads((tmp_path / "out" / "smelt.json").read_text())


def test_the_command_exports_and_refuses(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["export", str(tiny.artefact()), "-o", str(out), "--no-check"]
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["style"] == "standard" and told["nodes"]["Attention"] == 2 and told["unchecked"] == "check=False"
    assert (out / "tokenizer.json").is_file()
    for wrong in (["--style", "ortt"], ["--to", "tflite"], ["-o", str(tmp_path)]):
        assert CliRunner().invoke(app, [*words, *wrong]).exit_code == 2
    assert CliRunner().invoke(app, ["export", str(tmp_path / "none"), "-o", str(out)]).exit_code == 2
