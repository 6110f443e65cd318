"""The folder for transformers and vLLM: codes read by the layout's definition, what is refused, and loading it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import smelt
from smelt.cli import app
from smelt.export_hf import export_hf
from smelt.ir.encoding import Affine
from smelt.ir.errors import SmeltError
from smelt.ir.interpret import interpret
from smelt.ir.ops import RMS_NORM
from smelt.ir.weight import Weight
from smelt.packed import Scheme, pack, scheme

from . import tiny

CODES = {"bits": 4, "group": 32}


def compiled(*steps: dict[str, Any]) -> smelt.Compiled:
    recipe = {"name": "x", "family": "weights", "does": "x", "steps": [*steps, {"cache.insert": {"dtype": "float16"}}]}
    return smelt.compile(tiny.model(), recipe, target="torch")


@pytest.fixture(scope="module")
def mixed() -> smelt.Compiled:
    """4 bits a row or in groups of 32 and, in one of three products of an input, 16; an untied head of 8 bits."""
    made = compiled({"weights.untie": {}}, {"weights.quantize": CODES})
    weights, layer = made.program.weights, "model.layers.{}.weight"
    lone, fine = layer.format("1.mlp.down_proj"), layer.format("0.self_attn.k_proj")
    weights[lone] = Weight.of(weights[lone].dense()).encoded(Affine(4, 0))
    weights[fine] = Weight.of(weights[fine].dense()).encoded(Affine(4, 16))
    return made


def read(tensors: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
    """A matrix, code by code: bit j * bits of a row's words, least significant first, is where code j begins."""
    rows, columns = tensors["weight_shape"].tolist()
    assert tensors["weight_packed"].dtype == torch.int32
    assert tensors["weight_packed"].shape == (rows, -(-columns * bits // 32))
    streams = [
        sum((word & 0xFFFFFFFF) << 32 * at for at, word in enumerate(row)) for row in tensors["weight_packed"].tolist()
    ]
    codes = [[(stream >> j * bits & (1 << bits) - 1) - (1 << bits - 1) for j in range(columns)] for stream in streams]
    scale = tensors["weight_scale"].float()
    return torch.tensor(codes).float() * scale.repeat_interleave(columns // scale.shape[1], 1)


@pytest.mark.parametrize("group", [32, 96, 192])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_lie_where_the_layout_says(bits: int, group: int) -> None:
    matrix = torch.randn(5, 192, generator=torch.Generator().manual_seed(bits))
    weight = Weight.of(matrix).encoded(Affine(bits, group))
    kind = scheme(weight)
    assert kind == Scheme(bits, 0 if group == 192 else group)
    for wanted in (kind, Scheme(bits, 32)):
        tensors = pack(weight, wanted)
        assert tensors["weight_scale"].dtype == torch.float16
        for dtype in (torch.float32, torch.float16):
            assert torch.equal(read(tensors, bits).to(dtype), weight.dense(dtype))
    tensors["weight_packed"][2] += 1
    assert not torch.equal(read(tensors, bits), weight.dense())


def test_rows_end_in_whole_words() -> None:
    weight = Weight.of(torch.randn(3, 33)).encoded(Affine(8, 0))
    tensors = pack(weight, Scheme(8, 0))
    assert tensors["weight_packed"].shape == (3, 9) and torch.equal(read(tensors, 8), weight.dense())


def test_the_folder_says_the_program(mixed: smelt.Compiled, tmp_path: Path) -> None:
    done = mixed.export_hf(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    told, tensors = config["quantization_config"], load_file(tmp_path / "out" / "model.safetensors")
    assert (told["format"], told["ignore"], config["tie_word_embeddings"]) == ("pack-quantized", [], False)
    matrices = {}
    for entry in told["config_groups"].values():
        for module in entry["targets"]:
            parts = {
                part: tensors.pop(f"{module}.{part}") for part in ("weight_packed", "weight_scale", "weight_shape")
            }
            matrices[f"{module}.weight"] = read(parts, entry["weights"]["num_bits"])
            group = entry["weights"].get("group_size", parts["weight_shape"][1])
            assert parts["weight_scale"].shape[1] * group == parts["weight_shape"][1]
    assert len(matrices) == 15 and not matrices.keys() & tensors.keys()
    for name, value in {**matrices, **tensors}.items():
        assert torch.equal(value, mixed.program.weights[name].dense()), name
    fine = [entry["targets"] for entry in told["config_groups"].values() if entry["weights"].get("group_size") == 16]
    assert fine == [[f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]]  # vLLM stacks them: one scheme for all
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "model.safetensors", "smelt.json", *tiny.TOKENIZER
    }  # fmt: skip
    assert done.error is not None and done.error < 1e-6
    assert [note.partition(" ")[0] for note in done.notes] == ["left", "model.embed_tokens.weight"]


def test_transformers_loads_it(mixed: smelt.Compiled, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="transformers reads the layout with it")
    from transformers import AutoModelForCausalLM

    mixed.export_hf(tmp_path / "out")
    tokens = torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(1))
    inputs = {"tokens": tokens, "positions": torch.arange(24).expand(2, -1)}
    expected = interpret(mixed.program, inputs)["logits"]
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_without_codes_it_is_a_plain_model(tmp_path: Path) -> None:
    plain = compiled()
    plain.export_hf(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert plain.program.weights.keys() == smelt.compile(tmp_path / "out", target="torch").program.weights.keys()


def test_what_the_layout_cannot_say_is_refused(mixed: smelt.Compiled, tmp_path: Path) -> None:
    up, quantized = "model.layers.1.mlp.up_proj.weight", {"weights.quantize": {**CODES, "zero": True}}
    gone, cut = mixed.program.fork(), mixed.program.fork()
    del gone.weights[up]
    cut.weights[up] = Weight.of(torch.zeros(96, 64))
    for program, files, message in (
        (compiled(quantized).program, mixed.assets.files, "since step 1, .* set zero: false; allow_decoded=True"),
        (gone, mixed.assets.files, f"'{up}' is gone, but config.json asks for it"),
        (cut, mixed.assets.files, rf"'{up}' has the shape \[96, 64\] since step 2, .* asks for \[128, 64\]"),
        (gone, {}, "compiled without a config.json"),
    ):
        with pytest.raises(SmeltError, match=message):
            export_hf(program, tmp_path / "out", assets=files)
    assert list(tmp_path.iterdir()) == []


def test_another_encoding_is_decoded_if_that_is_allowed(tmp_path: Path) -> None:
    model = compiled({"weights.quantize": {**CODES, "zero": True, "head": "keep"}})
    done = model.export_hf(tmp_path / "out", allow_decoded=True)
    assert not done.matrices and "q_proj.weight and 13 more are written as float32" in done.notes[-1]
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], model.program.weights[name].dense())


def test_a_graph_that_the_configuration_does_not_say_is_refused(mixed: smelt.Compiled, tmp_path: Path) -> None:
    program = mixed.program.fork()
    node = next(program.calls(RMS_NORM))
    with program.graph.inserting_after(node):
        louder = program.graph.call_function(torch.ops.aten.mul.Scalar, (node, 1.05))
    node.replace_all_uses_with(louder, delete_user_cb=lambda user: user is not louder)
    with pytest.raises(
        SmeltError, match=r"LlamaForCausalLM computes something else .* weights\.quantize, cache\.insert"
    ):
        export_hf(program, tmp_path / "out", assets=mixed.assets.files)
    assert list(tmp_path.iterdir()) == []


def test_an_artefact_is_exported_by_the_command(mixed: smelt.Compiled, tmp_path: Path) -> None:
    mixed.save(tmp_path / "a.smelt")
    command = ["export", str(tmp_path / "a.smelt"), "--to", "hf", "-o", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert sum(kind["count"] for kind in told["matrices"]) == 15
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(SmeltError, match="is not an export of smelt"):
        mixed.export_hf(tmp_path / "notes")
