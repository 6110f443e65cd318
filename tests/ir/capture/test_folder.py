"""Bad model folders: one SmeltError each that names the place and the way out."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from smelt.ir.capture import capture
from smelt.ir.capture.checkpoint import entries, read_header
from smelt.ir.errors import SmeltError

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 19,
    "max_position_embeddings": 32,
    "bos_token_id": None,
    "eos_token_id": None,
}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that captures."""
    import transformers

    folder = tmp_path_factory.mktemp("sound") / "model"
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return shutil.copytree(sound, tmp_path / "model")


def described(folder: Path, **change: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def stored(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the header of a safetensors file, tensors as they are."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    told = json.loads(raw[8 : 8 + length])
    change(told)
    written = json.dumps(told).encode()
    path.write_bytes(struct.pack("<Q", len(written)) + written + raw[8 + length :])


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def grown(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0" * 64)


def sharded(folder: Path, names: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "not a model folder, it has no config.json"),
    "config is not JSON": (
        lambda f: (f / "config.json").write_text("{"),
        r"config.json: cannot be read as JSON .*line 1",
    ),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json: has no model_type"),
    "no model type": (lambda f: described(f, model_type=None), "config.json: has no model_type"),
    "a model type nobody knows": (
        lambda f: described(f, model_type="lama"),
        r"no model_type 'lama' \(did you mean 'llama'\?\); a newer transformers may have it",
    ),
    "code in the folder": (
        lambda f: described(f, model_type="mine", auto_map={"AutoConfig": "configuration.Mine"}),
        "'mine' needs Python code from the model's folder .trust_remote_code., which smelt never runs",
    ),
    "quantized already": (
        lambda f: described(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        r"quantized already \(by gptq\); give the original model",
    ),
    "an activation nobody knows": (
        lambda f: described(f, hidden_act="sillu"),
        r"config.json: transformers cannot build a llama model: .*sillu",
    ),
    "a number that is none": (
        lambda f: described(f, num_hidden_layers="many"),
        r"config.json: (not a valid configuration of|transformers cannot build a) llama.*num_hidden_layers",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"no weights, neither {WEIGHTS} nor {INDEX}"),
    "only a pickle": (
        lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"),
        "holds the pickle pytorch_model.bin, which can run code and is refused; .*save_pretrained",
    ),
    "an index that is not JSON": (lambda f: (f / INDEX).write_text("]"), f"{INDEX}: not a safetensors index"),
    "an index without a map": (lambda f: (f / INDEX).write_text("{}"), f"{INDEX}: not a safetensors index .KeyError"),
    "a missing shard": (
        lambda f: sharded(f, {NORM: "model-00002.safetensors"}),
        f"model-00002.safetensors: this shard is missing .{INDEX} names it.; download the model again",
    ),
    "a shard elsewhere": (
        lambda f: sharded(f, {NORM: "../other.safetensors"}),
        "the shard '../other.safetensors' lies outside the model folder",
    ),
    "an empty file": (lambda f: cut(f / WEIGHTS, 0), f"{WEIGHTS}: truncated, 0 bytes hold no safetensors header"),
    "a header cut short": (lambda f: cut(f / WEIGHTS, 100), r"the header claims \d+ bytes, the file has 92"),
    "an enormous header": (
        lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 62) + b"{}"),
        f"the header claims {1 << 62} bytes, the file has 2; it is truncated or broken",
    ),
    "a header that is not JSON": (
        lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 2) + b"{{"),
        f"{WEIGHTS}: the header is not JSON",
    ),
    "a header that is a list": (
        lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 2) + b"[]"),
        f"{WEIGHTS}: the header is not a JSON object",
    ),
    "tensors cut short": (
        lambda f: cut(f / WEIGHTS, (f / WEIGHTS).stat().st_size - 8),
        rf"{WEIGHTS}: tensor '.*' ends at byte \d+, the file holds \d+: truncated",
    ),
    "more than the tensors": (lambda f: grown(f / WEIGHTS), f"{WEIGHTS}: not a sound safetensors file"),
    "offsets beyond the file": (
        lambda f: header(f / WEIGHTS, lambda h: h[NORM].update(data_offsets=[1 << 40, (1 << 40) + 64])),
        rf"tensor '{re.escape(NORM)}' ends at byte {(1 << 40) + 64}, the file holds",
    ),
    "offsets that do not fit the shape": (
        lambda f: header(f / WEIGHTS, lambda h: h[NORM].update(shape=[17])),
        rf"tensor '{re.escape(NORM)}' of shape \[17\] cannot fill bytes",
    ),
    "a negative size": (
        lambda f: header(f / WEIGHTS, lambda h: h[NORM].update(shape=[-1, -16])),
        r"of shape \[-1, -16\] cannot fill bytes",
    ),
    "a type nobody knows": (
        lambda f: header(f / WEIGHTS, lambda h: h[NORM].update(dtype="F8_E4M3")),
        f"tensor '{re.escape(NORM)}' has the type F8_E4M3; smelt reads F64, F32",
    ),
    "an entry that is none": (
        lambda f: header(f / WEIGHTS, lambda h: h.update({NORM: {"dtype": "F32"}})),
        f"tensor '{re.escape(NORM)}' has an unreadable header entry",
    ),
    "a shape of another model": (
        lambda f: stored(f, lambda t: t.update({NORM: torch.ones(17)})),
        rf"'{re.escape(NORM)}' has shape \[17\], but config.json asks for \[16\]",
    ),
    "a tensor that is missing": (
        lambda f: stored(f, lambda t: t.pop(NORM)),
        rf"has no tensor for '{re.escape(NORM)}' \(did you mean 'model.layers.0",
    ),
    "weights that are not numbers": (
        lambda f: stored(f, lambda t: t[NORM].fill_(torch.nan)),
        f"outputs are not finite; weight '{re.escape(NORM)}' holds NaN or infinite values",
    ),
}


def test_the_sound_folder_is_captured(folder: Path) -> None:
    assert capture(folder).facts["context"] == 32


@pytest.mark.parametrize("fault", BROKEN)
def test_says_what_is_wrong_and_where(fault: str, folder: Path) -> None:
    spoil, reason = BROKEN[fault]
    spoil(folder)
    with pytest.raises(SmeltError, match=reason) as caught:
        capture(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message or message.startswith("llama:"), "names the place"


def test_files_are_no_models(folder: Path) -> None:
    with pytest.raises(SmeltError, match="pickle can run code and is refused"):
        capture(folder / "pytorch_model.bin")
    with pytest.raises(SmeltError, match="is a file; give the model's folder"):
        capture(folder / WEIGHTS)
    with pytest.raises(SmeltError, match="takes a folder, a hub id or a torch module, not a int"):
        capture(3)  # type: ignore[arg-type]  # the fault under test


def test_a_folder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SmeltError, match=r"nowhere: no such folder \(a hub id looks like owner/name\)"):
        capture(tmp_path / "nowhere")

    def offline(*_: object, **__: object) -> str:
        raise ConnectionError("no network in tests")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(
        SmeltError, match=r"owner/name: no such folder, and the hub did not serve it \(ConnectionError\)"
    ):
        capture("owner/name")


def test_a_hub_id_is_the_folder_that_the_hub_gives(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def snapshot(identifier: str, allow_patterns: list[str]) -> str:
        asked.append(identifier)
        assert not any(pattern.endswith((".bin", ".py")) for pattern in allow_patterns), "neither pickles nor code"
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert capture("owner/name").facts["source"] == "model"
    assert asked == ["owner/name"]


def test_headers_are_read_without_their_tensors(folder: Path) -> None:
    found = read_header(folder / WEIGHTS)
    assert found.keys() == load_file(folder / WEIGHTS).keys()
    assert found[NORM].shape == (16,) and found[NORM].dtype == torch.float32
    assert torch.equal(entries(folder)[NORM].read(), load_file(folder / WEIGHTS)[NORM])


def test_transformers_is_named_when_it_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "smelt.ir.capture.hf", None)
    with pytest.raises(SmeltError, match=r"needs transformers: pip install 'smelt\[hf\]'"):
        capture(folder)


def test_a_model_is_traced_once_for_each_configuration(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from smelt.ir.capture import hf
    from smelt.ir.text import print_program

    traced: list[str] = []
    export = hf._export
    monkeypatch.setattr(hf, "_traced", {})
    monkeypatch.setattr(hf, "_export", lambda *given: traced.append(given[-1]) or export(*given))
    first = capture(folder)
    text = print_program(first)
    first.graph.erase_node(next(iter(reversed(first.graph.nodes))))
    first.graph.output({})
    assert print_program(capture(folder)) == text
    before = first.weights[NORM].dense().clone()
    stored(folder, lambda tensors: tensors[NORM].mul_(2.0))
    assert torch.equal(capture(folder).weights[NORM].dense(), 2 * before)
    assert len(traced) == 1
    described(folder, rms_norm_eps=0.123)  # a number that only the trace holds
    assert "0.123" in print_program(capture(folder)) and "0.123" not in text and len(traced) == 2
