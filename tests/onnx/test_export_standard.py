"""export_onnx in style standard: recipes, families, encoders and plain modules agree with what is exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

import smelt
import smelt.export
from smelt.codegen.onnx import export
from smelt.ir.capture import capture
from smelt.ir.encoding import Affine
from smelt.ir.interpret import interpret
from smelt.ir.ops import LINEAR, arguments
from smelt.ir.weight import Weight
from smelt.runtime.onnx_loop import open_session

from ..families import zoo
from ..ir.programs import captured, quantized

pytest.importorskip("onnxruntime", reason="runs what is exported in onnxruntime")

NOTHING: dict[str, Any] = {"name": "nothing", "family": "baseline", "does": "Nothing at all.", "steps": []}
# what a tiny model of 2 layers and 97 words needs to follow a recipe
CHANGES: dict[str, tuple[str, ...]] = {
    "finequant": (),
    "w4a8": (),
    "stat": (),
    "quantized-pruning": ("cache.select.skip_layers=[]", "cache.select.tail=32"),
    "token-recycling": (),
    "medusa-heads": ("train.heads.steps=2", "train.heads.length=32"),
    "all-four": ("cache.select.skip_layers=[1]", "cache.select.tail=32"),
}


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smelt.export, "STEPS", 12)


@pytest.mark.parametrize("recipe", CHANGES)
def test_a_recipe_exports_and_agrees(recipe: str, tmp_path: Path) -> None:
    samples = torch.randint(0, zoo.VOCABULARY, (16, 96), generator=torch.Generator().manual_seed(1))
    lm = smelt.compile(zoo.model("qwen3"), recipe, calibration=samples, overrides=list(CHANGES[recipe]), target="torch")
    done = lm.export_onnx(tmp_path / "out")
    assert [case.prompts for case in done.cases] == [(1,), (1, 116, 58)]
    assert all(case.agrees for case in done.cases)
    assert recipe == "w4a8" or max(case.bar for case in done.cases) < 0.02
    told = json.loads((tmp_path / "out" / "smelt.json").read_text())
    assert told["recipe"]["name"] == recipe and len(told["checked"]) == 2
    assert (told["drafter"] is not None) == (recipe in ("token-recycling", "medusa-heads", "all-four"))
    if recipe in ("finequant", "w4a8", "all-four"):
        assert told["weight_bytes"] < 1.2 * lm.program.nbytes


@pytest.mark.parametrize("family", zoo.GENERATING)
def test_a_family_exports_and_agrees(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smelt.export, "STEPS", 64 if family == "llama" else 4)
    done = smelt.compile(zoo.model(family), "none", target="torch").export_onnx(tmp_path / "out")
    assert done.error is not None and done.error < 1e-5
    assert all(case.text for case in done.cases)


@pytest.mark.parametrize("family", ["cohere", "qwen3_moe"])
def test_a_whole_text_is_read_without_a_past(family: str, tmp_path: Path) -> None:
    lm = smelt.compile(zoo.model(family), "none", target="torch")
    done = lm.export_onnx(tmp_path / "out", cache=False)
    assert done.error is not None and done.error < 1e-5
    assert not any("past" in name for name in json.loads((tmp_path / "out" / "smelt.json").read_text()))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mistral_window"])
def test_what_is_exported_is_imported_as_it_was(family: str, tmp_path: Path) -> None:
    program = capture(zoo.model(family))
    export(program, tmp_path / "out")
    back = smelt.compile(str(tmp_path / "out" / "model.onnx"), "none", target="torch").program
    tokens = torch.arange(40).view(2, 20)
    inputs = {"tokens": tokens, "positions": torch.arange(20).expand(2, 20).contiguous()}
    ours, theirs = (interpret(each, inputs)["logits"] for each in (program, back))
    assert float((ours - theirs).abs().max() / ours.abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["BertConfig", "RobertaConfig"])
def test_an_encoder_reads_its_mask(name: str, tmp_path: Path) -> None:
    sizes = {key: value for key, value in zoo._NO_GROUPS.items() if key != "pad_token_id"}
    source = zoo.random_model(getattr(transformers, name)(**sizes, pad_token_id=1), transformers.AutoModel)
    done = smelt.compile(source, NOTHING, target="torch").export_onnx(tmp_path / "out")
    assert done.error is not None and done.error < 1e-5


class Net(nn.Module):
    """A small convolutional net."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.groups = nn.Conv2d(8, 16, 3, stride=2, groups=2), nn.GroupNorm(4, 16)
        self.last = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool2d(functional.relu(self.norm(self.first(x))), 2)
        x = self.groups(functional.gelu(self.second(x)))
        return functional.log_softmax(self.last(functional.adaptive_avg_pool2d(x, 1).flatten(1)), -1)


def test_a_convolutional_net_takes_any_batch(tmp_path: Path) -> None:
    lm = smelt.compile(Net().eval(), NOTHING, example=(torch.randn(2, 3, 32, 32),), target="torch")
    done = lm.export_onnx(tmp_path / "out")
    assert [case.prompts[0] for case in done.cases] == [1, 3]
    assert done.error is not None and done.error < 1e-5


@pytest.mark.parametrize(
    "encoding", ["affine(2, 64)", "affine(4, 0)", "affine(8, 16)", "affine(4, 32, zero)", "affine(8, 16, channel)"]
)
def test_every_width_of_codes_is_written_as_codes(encoding: str, tmp_path: Path) -> None:
    bits, group, *words = encoding[7:-1].split(", ")
    chosen = Affine(int(bits), int(group), "channel" if "channel" in words else "token", "zero" in words)
    program = quantized(captured("llama"), chosen)
    done = export(program, tmp_path / "out")
    inputs = {"tokens": torch.arange(14).view(2, 7), "positions": torch.arange(7).expand(2, 7).contiguous()}
    ours = interpret(program, inputs)["logits"].detach()
    theirs = torch.from_numpy(
        open_session(tmp_path / "out").run(["logits"], {name: value.numpy() for name, value in inputs.items()})[0]
    )
    assert float((ours - theirs).abs().max() / ours.abs().max()) < 1e-5
    assert done.nodes["DequantizeLinear"] == len(list(program.calls(LINEAR)))


def test_the_check_sees_a_wrong_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = smelt.compile(zoo.model("llama"), "none", target="torch")
    wrong = lm.program.fork()
    name = str(arguments(next(iter(wrong.calls(LINEAR))))["weight"].target)
    wrong.weights[name] = Weight.of(wrong.weights[name].dense() * 1.05)
    with pytest.raises(smelt.SmeltError, match="differs from the model"):
        smelt.export.export_onnx(wrong, lm.plan, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
