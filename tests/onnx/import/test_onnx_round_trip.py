"""What smelt exports with its cache comes back: compiled by `none`, it says what the exported Program says."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers

import smelt
from smelt import kept
from smelt.ir.capture import capture
from smelt.ir.capture.variants import relative_error
from smelt.ir.errors import SmeltError
from smelt.ir.interpret import interpret
from smelt.ir.ops import ATTENTION, CACHED_ATTENTION, EMBEDDING, HEAD, LINEAR, QUANTIZED, arguments
from smelt.ir.program import Program

from ...families import zoo

TOLERANCE = 1e-4
NOTHING: dict[str, Any] = {"name": "nothing", "family": "baseline", "does": "Nothing at all.", "steps": []}
PROMPTS = [[5, 6, 7, 8], [9], list(range(20, 40))]
FEW_LAYERS = ("cache.select.skip_layers=[]", "cache.select.tail=32")
# recipe: changes for a tiny model, and whether its cache keeps what it is given
RECIPES: dict[str, tuple[tuple[str, ...], bool]] = {
    "none": ((), True),
    "finequant": ((), True),
    "w4a8": ((), True),
    "stat": ((), True),
    "token-recycling": ((), True),
    "medusa-heads": (("train.heads.steps=2", "train.heads.length=32"), True),
    "quantized-pruning": (FEW_LAYERS, False),
}
Exports = Callable[..., tuple[smelt.Compiled, Path]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """A compiled family and the folder of its export, made once; leave both as they are."""
    samples = torch.randint(0, zoo.VOCABULARY, (16, 96), generator=torch.Generator().manual_seed(1))

    @functools.cache
    def make(family: str, recipe: str = "none") -> tuple[smelt.Compiled, Path]:
        changes = RECIPES[recipe][0]
        source = shallow(family) if family == "qwen3" else zoo.model(family)
        lm = smelt.compile(source, recipe, calibration=samples, overrides=changes, target="torch")
        folder = tmp_path_factory.mktemp("export") / f"{family}-{recipe}"
        lm.export_onnx(folder, check=False)
        return lm, folder

    return make


def shallow(family: str, **changes: Any) -> Any:
    """A family in one layer."""
    kind, config = zoo.CONFIGS[family]
    return zoo.random_model(getattr(transformers, kind)(**{**config, "num_hidden_layers": 1, **changes}))


def logits(program: Program, shape: Sequence[int] = (2, 40)) -> torch.Tensor:
    tokens = torch.randint(0, zoo.VOCABULARY, tuple(shape), generator=torch.Generator().manual_seed(2))
    positions = torch.arange(shape[1]).expand(tokens.shape).contiguous()
    return interpret(program, {"tokens": tokens, "positions": positions})["logits"]


def encodings(program: Program) -> list[str]:
    """Of every table's and product's weight, in order."""
    products = program.calls(EMBEDDING, LINEAR, HEAD)
    return [str(program.weights[str(arguments(node)["weight"].target)].encoding) for node in products]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_comes_back(recipe: str, exported: Exports) -> None:
    lm, folder = exported("qwen3", recipe)
    back = smelt.compile(folder, "none", target="torch")
    assert relative_error(logits(back.program), logits(lm.program)) <= TOLERANCE
    if RECIPES[recipe][1]:
        tokens = back.generate(PROMPTS, max_new_tokens=8)
        assert tokens == lm.generate(PROMPTS, max_new_tokens=8, speculate=False)
        assert len({tuple(row) for row in tokens}) == len(PROMPTS)
    facts = back.program.facts
    assert (facts["kind"], facts["family"], facts["context"], facts["hidden"]) == ("decoder", "qwen3", zoo.CONTEXT, 64)
    assert any("cache of the file was left out" in note for note in facts["notes"])
    assert any("drafter" in note for note in facts["notes"]) == (recipe == "medusa-heads")
    before, after = (encodings(each.program) for each in (lm, back))
    assert after == before[: len(after)] and (len(after) == len(before) or recipe == "medusa-heads")
    assert ("affine" in "".join(after)) == (recipe in ("finequant", "w4a8"))
    assert len(list(back.program.calls(QUANTIZED))) == len(list(lm.program.calls(QUANTIZED)))


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "mistral_window"])
def test_a_family_comes_back(family: str, exported: Exports) -> None:
    lm, folder = exported(family)
    back = capture(folder / "model.onnx")
    assert relative_error(logits(back), logits(lm.program)) <= TOLERANCE
    mine = [arguments(node)["window"] for node in back.calls(ATTENTION)]
    assert mine == [arguments(node)["window"] for node in lm.program.calls(CACHED_ATTENTION)]


def test_windows_over_pages_come_back(exported: Exports) -> None:
    lm, folder = exported("gemma2", "quantized-pruning")
    back = capture(folder)
    assert relative_error(logits(back), logits(lm.program)) <= TOLERANCE
    assert [arguments(node)["window"] for node in back.calls(ATTENTION)] == [zoo.WINDOW, None]


def changed(folder: Path, to: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """The export with another graph, and its weights inside the file."""
    model = onnx.load(folder / "model.onnx")
    change(model)
    to.mkdir()
    onnx.save(model, to / "model.onnx")
    return to


def test_a_wrong_weight_is_seen(exported: Exports, tmp_path: Path) -> None:
    """The comparison above can fail: a norm that is 5 % off."""
    lm, folder = exported("qwen3")

    def scale(model: onnx.ModelProto) -> None:
        norm = next(t for t in model.graph.initializer if t.name.endswith("layers.0.input_layernorm.weight"))
        norm.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(norm) * np.float32(1.05), norm.name))

    back = capture(changed(folder, tmp_path / "out", scale))
    assert relative_error(logits(back), logits(lm.program)) > 1e-3


def turn(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "LessOrEqual":
            node.op_type = "GreaterOrEqual"


def disguise(model: onnx.ModelProto) -> None:
    """What attention reads is not what the cache stores: its keys are turned around on the way."""
    node = next(node for node in model.graph.node if node.op_type == "Attention")
    model.graph.node.insert(list(model.graph.node).index(node), onnx.helper.make_node("Neg", [node.input[1]], ["-"]))
    node = next(node for node in model.graph.node if node.op_type == "Attention")
    node.input[1] = "-"


def nameless(model: onnx.ModelProto) -> None:
    next(output for output in model.graph.output if output.name == "logits").name = "present.0.keys.dense"
    next(node for node in model.graph.node if node.output[0] == "logits").output[0] = "present.0.keys.dense"


def enormous(model: onnx.ModelProto) -> None:
    port = next(port for port in model.graph.input if port.name == "past.0.keys")
    port.type.tensor_type.shape.dim[2].dim_value = 1 << 40


DAMAGE: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "a mask that looks ahead": (turn, r"Attention .* reads a cache, but its mask '.*' is neither causal"),
    "keys that are changed": (disguise, r"its first step differs from what its attention says of a text"),
    "no logits": (nameless, r"inputs of a decoder that smelt exported, but no output 'logits'"),
    "an enormous cache": (enormous, r"input 'past\.0\.keys' has \[2, 2, 1099511627776, 32\] elements"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_export_is_refused(damage: str, exported: Exports, tmp_path: Path) -> None:
    change, message = DAMAGE[damage]
    folder = changed(exported("qwen3")[1], tmp_path / "out", change)
    with pytest.raises(SmeltError, match=message) as caught:
        capture(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"context": "long"}, r"smelt\.json: 'context' is 'long'; a number of tokens is wanted"),
        ({"context": -1}, r"smelt\.json: 'context' is -1; a number of tokens is wanted"),
        ({"eos": [1.5]}, r"smelt\.json: 'eos' is \[1\.5\]; a token id or a list of them is wanted"),
        ([1], r"smelt\.json: is no object"),
    ],
)
def test_a_manifest_is_doubted(told: Any, message: str, exported: Exports, tmp_path: Path) -> None:
    folder = changed(exported("qwen3")[1], tmp_path / "out", lambda model: None)
    (folder / "smelt.json").write_text(json.dumps(told))
    with pytest.raises(SmeltError, match=message):
        capture(folder)


def test_sinks_are_refused(exported: Exports) -> None:
    with pytest.raises(SmeltError, match=r"'past\.0\.keys' is read by other nodes than ONNX's Attention, as .* sinks"):
        capture(exported("granite_swa")[1])


def test_a_window_wider_than_any_text_looked_at_is_found(tmp_path: Path, window: int = 5000) -> None:
    source = shallow("mistral_window", sliding_window=window, max_position_embeddings=8 * window)
    lm = smelt.compile(source, "none", target="torch")
    lm.export_onnx(tmp_path / "step", check=False)
    lm.export_onnx(tmp_path / "text", check=False, cache=False)
    for folder in ("step", "text"):
        back = capture(tmp_path / folder)
        assert [arguments(node)["window"] for node in back.calls(ATTENTION)] == [window]


def test_weights_in_a_subfolder_tell_compiles_apart(
    exported: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was kept of one compile is not taken for another whose external data differ."""
    monkeypatch.setenv("SMELT_KEEP", "1")
    model = onnx.load(exported("qwen3")[1] / "model.onnx")
    (tmp_path / "data").mkdir()
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="data/w.bin", size_threshold=0)
    before = kept.key("none", [tmp_path], None)
    assert before is not None and before == kept.key("none", [tmp_path], None)
    data = bytearray((tmp_path / "data" / "w.bin").read_bytes())
    data[-1] ^= 1
    (tmp_path / "data" / "w.bin").write_bytes(data)
    assert kept.key("none", [tmp_path], None) not in (None, before)
    assert kept.key("none", [tmp_path / "model.onnx"], None) is None, "a bare file is compiled anew"


def test_a_plain_module_comes_back(tmp_path: Path) -> None:
    source = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(144, 5))
    lm = smelt.compile(source.eval(), NOTHING, example=(torch.randn(2, 3, 8, 8),), target="torch")
    lm.export_onnx(tmp_path / "out", check=False)
    back = smelt.compile(tmp_path / "out", NOTHING, target="torch")
    image = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    ours, theirs = (interpret(each.program, {each.program.inputs[0]: image}) for each in (lm, back))
    assert ours.keys() == theirs.keys()
    assert all(relative_error(theirs[name], ours[name]) <= TOLERANCE for name in ours)


def test_an_encoder_comes_back(tmp_path: Path) -> None:
    sizes = {key: value for key, value in zoo._NO_GROUPS.items() if key != "pad_token_id"}
    source = zoo.random_model(transformers.BertConfig(**sizes, pad_token_id=1), transformers.AutoModel)
    lm = smelt.compile(source, NOTHING, target="torch")
    lm.export_onnx(tmp_path / "out", check=False)
    back = smelt.compile(tmp_path / "out", NOTHING, target="torch")
    tokens = torch.randint(0, zoo.VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(4))
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[1, 7:] = 0
    given = {"tokens": tokens, "mask": mask}
    ours, theirs = (interpret(each.program, given) for each in (lm, back))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert relative_error(theirs[name][mask.bool()], ours[name][mask.bool()]) <= TOLERANCE
