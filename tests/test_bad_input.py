"""Whatever a user can get wrong ends as one clear line and the exit code 2, and leaves nothing half written."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import smelt
from smelt.cli import app
from smelt.runtime.artefact import MANIFEST, SEAL, WEIGHTS

from . import tiny


def smelt_(*words: object) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(app, [str(word) for word in words])


def refused(result: Result, *said: str) -> None:
    """One line that begins with `error: ` and holds every word of `said`; exit code 2."""
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert all(word in result.stderr for word in said), result.stderr
    assert "Traceback" not in result.output


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


RECIPES = {
    "unknown key": ("name: r\nfamily: cache\ndoes: x\nstpes: []", ["r.yaml:4", "stpes", "steps"]),
    "unknown option": (
        "name: r\nfamily: cache\ndoes: x\nsteps:\n- cache.insert: {dtpye: float32}",
        ["r.yaml:5", "dtype"],
    ),
    "unknown pass": ("name: r\nfamily: cache\ndoes: x\nsteps:\n- cache.insret", ["r.yaml:5", "cache.insert"]),
    "wrong type": ("name: r\nfamily: cache\ndoes: x\nsteps:\n- cache.insert: {dtype: 3}", ["r.yaml:5", "dtype"]),
    "cyclic include": ("name: r\nfamily: cache\ndoes: x\nsteps:\n- include: ./r.yaml", ["r.yaml:5", "cycle"]),
    "not YAML": ("name: [", ["r.yaml", "not valid YAML"]),
    "empty": ("", ["r.yaml", "empty"]),
    "matches nothing": (
        "name: r\nfamily: cache\ndoes: x\nsteps:\n- cache.insert\n- cache.insert",
        ["r.yaml:6", "cache.insert#2"],
    ),
    "a budget of nothing": (
        "name: r\nfamily: cache\ndoes: x\nsteps:\n- cache.insert\n- cache.retrieve: {budget: 0}",
        ["r.yaml:6", "cache.retrieve", "a budget of 0 tokens reads nothing"],
    ),
    "a budget beyond the context": (
        "name: r\nfamily: cache\ndoes: x\nsteps:\n- cache.insert\n"
        "- cache.select: {when: overflow, budget: 4096, skip_layers: []}",
        ["r.yaml:6", "a budget of 4096 tokens is never exceeded in this model's context of 256"],
    ),
    "a group beyond the segment": (
        "name: r\nfamily: cache\ndoes: x\nsteps:\n- cache.insert\n"
        "- cache.encode: {keys: {affine: {bits: 8, axis: channel, group: 64}}, tail: 16, page: 64}",
        ["r.yaml:6", "closes groups of 64 tokens, but the tail keeps 16"],
    ),
    "a codebook that does not divide a head": (
        "name: r\nfamily: cache\ndoes: x\nsteps:\n- cache.insert\n"
        "- cache.encode: {values: {codebook: {dims: 3, bits: 4, kind: gaussian}}}",
        ["r.yaml:6", "codebook", "16", "3"],
    ),
    "a score that is no weight": (
        "name: r\nfamily: cache\ndoes: x\nsteps:\n- cache.insert\n"
        "- cache.select: {when: prompt, keep: 0.5, skip_layers: []}\n- cache.merge: {share: 0.5}",
        ["r.yaml:7", "no weight for a mean"],
    ),
    "a gate that fails": (
        "name: r\nfamily: weights\ndoes: x\nsteps:\n- cache.insert\n"
        "- weights.quantize: {bits: 4, gate: {max_kl: 1e-9, otherwise: stop}}",
        ["r.yaml:6", "weights.quantize", "gate", "kl"],
    ),
}


@pytest.mark.parametrize("fault", RECIPES)
def test_a_recipe(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, said = RECIPES[fault]
    (tmp_path / "work").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    Path("r.yaml").write_text(text)
    refused(smelt_("compile", tiny.model(), "./r.yaml", "-o", "out"), *said)
    assert names(Path()) == {"r.yaml"}


def missing_shard(folder: Path) -> None:
    weights = {name: "model-00001.safetensors" for name in load_file(folder / "model.safetensors")}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


def truncated_body(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def truncated_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:50])


def oversized_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 60) + file.read_bytes()[8:])


def wrong_shape(folder: Path) -> None:
    change(folder, "model.layers.1.mlp.up_proj.weight", lambda weight: weight[:-1].contiguous())


def missing_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors")


def not_a_number(folder: Path) -> None:
    change(folder, "model.layers.1.mlp.up_proj.weight", lambda weight: weight.index_fill(0, torch.tensor(3), torch.nan))


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def no_configuration(folder: Path) -> None:
    (folder / "config.json").unlink()


def change(folder: Path, name: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name] = edit(weights[name])
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (missing_shard, ["model-00001.safetensors", "missing"]),
        (truncated_body, ["model.safetensors", "truncated"]),
        (truncated_header, ["model.safetensors", "truncated"]),
        (oversized_header, ["model.safetensors", "header"]),
        (wrong_shape, ["model.layers.1.mlp.up_proj.weight", "shape"]),
        (missing_tensor, ["model.layers.1.mlp.up_proj.weight"]),
        (not_a_number, ["model.layers.1.mlp.up_proj.weight", "NaN"]),
        (pickled, ["pytorch_model.bin", "pickle"]),
        (no_configuration, ["model"]),
    ],
)
def test_a_model(harm: Callable[[Path], None], said: list[str], tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model")
    harm(folder)
    refused(smelt_("compile", folder, "none", "-o", tmp_path / "out"), *said)
    assert names(tmp_path) == {"model"}


def test_a_model_that_is_a_pickle_file(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"\x80\x04.")
    refused(smelt_("compile", tmp_path / "model.pt", "none", "-o", tmp_path / "out"), "pickle")


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    refused(smelt_("compile", tmp_path / "nowhere", "none", "-o", tmp_path / "out"), "nowhere")
    refused(smelt_("inspect", tmp_path / "nowhere"), "nowhere")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """An artefact that may be damaged."""
    return Path(shutil.copytree(tiny.artefact(), tmp_path / "copy.smelt"))


def test_a_flipped_byte_in_any_file_of_an_artefact(copy: Path) -> None:
    for file in sorted(copy.iterdir()):
        content = bytearray(file.read_bytes())
        at = len(content) // 2
        content[at] ^= 1
        file.write_bytes(content)
        refused(smelt_("run", copy, "def"), file.name, "altered or damaged")
        content[at] ^= 1
        file.write_bytes(content)
    assert smelt_("run", copy, "def", "--max-new-tokens", 1).exit_code == 0


@pytest.mark.parametrize("name", [MANIFEST, SEAL, WEIGHTS, "program.txt", "tokenizer.json"])
def test_an_artefact_that_was_half_written(name: str, copy: Path) -> None:
    (copy / name).unlink()
    refused(smelt_("run", copy, "def"), "copy.smelt")
    refused(smelt_("verify", copy), "copy.smelt")


def test_an_artefact_of_a_newer_format(copy: Path) -> None:
    import hashlib

    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps(manifest | {"format": 99}))
    (copy / SEAL).write_text(hashlib.sha256((copy / MANIFEST).read_bytes()).hexdigest())
    refused(smelt_("run", copy, "def"), "format 99", "update smelt")


def test_what_is_no_artefact(tmp_path: Path) -> None:
    for command in (["run", tmp_path, "def"], ["verify", tmp_path], ["bench", tmp_path / "nowhere"]):
        refused(smelt_(*command), "not a smelt artefact")


def test_a_prompt() -> None:
    out = tiny.artefact()
    refused(smelt_("run", out, ""), "empty")
    refused(smelt_("run", out, tiny.tokens(300)), "context is 256")
    refused(smelt_("run", out, "def", "--max-new-tokens", 300), "context is 256")
    refused(smelt_("run", out, "1,4096", "--ids"), "4096", "0 to 4095")
    refused(smelt_("run", out, "1,-1", "--ids"), "-1")
    refused(smelt_("run", out, "1,x", "--ids"), "whole numbers")
    refused(smelt_("run", out, "", "--ids"), "empty")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--temperature", -1), ("--top-p", 2), ("--top-k", -1), ("--min-p", 1.5), ("--typical-p", 0), ("--seed", -1),
     ("--repetition-penalty", 0), ("--max-new-tokens", 0), ("--stop", "")],
)  # fmt: skip
def test_a_sampling_option(option: str, value: object) -> None:
    refused(smelt_("run", tiny.artefact(), "def", option, value), option.strip("-").replace("-", "_"))


def test_calibration(tmp_path: Path) -> None:
    empty, short, binary = (tmp_path / name for name in ("empty.txt", "short.txt", "binary.txt"))
    empty.write_text(" \n")
    short.write_text("def f(): pass")
    binary.write_bytes(b"\xff\xfe\x00")
    for file, said in (
        (empty, "empty"),
        (short, "too few"),
        (binary, "UTF-8"),
        (tmp_path / "nowhere.txt", "no such file"),
    ):
        refused(smelt_("compile", tiny.model(), "none", "-o", tmp_path / "out", "--calibration", file), file.name, said)
    assert "out" not in names(tmp_path)


def test_calibration_that_is_needed_is_asked_for_at_once(tmp_path: Path) -> None:
    refused(smelt_("compile", tmp_path / "unread", "medusa-heads", "-o", tmp_path / "out"), "--calibration")


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for out, said in (
        ("file", "not a smelt artefact"),
        ("full", "not a smelt artefact"),
        ("file/below", "cannot be written"),
    ):
        refused(smelt_("compile", tmp_path / "unread", "none", "-o", tmp_path / out), said)
    refused(smelt_("compile", tmp_path / "unread", "none"), "-o OUT")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_failed_compile_leaves_the_artefact_before_it(copy: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    model = tiny.write_model(tmp_path / "model")
    not_a_number(model)
    refused(smelt_("compile", model, "none", "-o", copy), "NaN")
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SMELT_DEBUG", "loud")
    refused(smelt_("compile", tiny.model(), "none", "-o", tmp_path / "out"), "SMELT_DEBUG", "loud")


def test_the_api_raises_the_same(tmp_path: Path) -> None:
    with pytest.raises(smelt.SmeltError, match="no recipe 'nope'"):
        smelt.compile(tiny.model(), "nope")
    lm = smelt.load(tiny.artefact())
    with pytest.raises(smelt.SmeltError, match="empty"):
        lm.generate("")
    with pytest.raises(smelt.SmeltError, match="0 to 4095"):
        lm.generate([4096])
