"""Decoders from .onnx files, by both of torch's exporters: logits and greedy tokens are those of the model's folder."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import smelt
from smelt.ir.capture import capture
from smelt.ir.capture.variants import relative_error
from smelt.ir.errors import SmeltError
from smelt.ir.interpret import interpret
from smelt.ir.ops import ATTENTION, HEAD, RMS_NORM, ROTARY, arguments
from smelt.ir.program import Program
from smelt.ir.verify import verify

from ...families.zoo import CONTEXT, VOCABULARY, WINDOW, model, save
from .exports import by_export, by_trace, with_past

TOLERANCE = 1e-5
MADE: dict[str, tuple[Callable[[str, Path, int], Path], str, int]] = {
    "llama traced": (by_trace, "llama", 14),
    "gpt2 traced": (by_trace, "gpt2", 13),
    "opt traced": (by_trace, "opt", 17),
    "mistral with a window traced": (by_trace, "mistral_window", 16),
    "llama exported": (by_export, "llama", 18),
    "gemma2 exported": (by_export, "gemma2", 23),
    "qwen3 with past": (with_past, "qwen3", 23),
}
Files = Callable[[str], Path]
Captured = Callable[[str], Program]


@pytest.fixture(scope="module")
def file_of(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Exports once."""
    root, made = tmp_path_factory.mktemp("onnx"), dict[str, Path]()

    def file(name: str) -> Path:
        if name not in made:
            export, family, opset = MADE[name]
            made[name] = export(family, root / f"{name.replace(' ', '-')}.onnx", opset)
        return made[name]

    return file


@pytest.fixture(scope="module")
def captured(file_of: Files) -> Captured:
    """Captures once; the Programs are shared, so leave them as they are."""
    return functools.cache(lambda name: capture(file_of(name)))


@torch.no_grad()
def eager(family: str, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of transformers' eager attention."""
    source: Any = model(family)
    before = source.config._attn_implementation
    source.set_attn_implementation("eager")
    logits: torch.Tensor = source(input_ids=tokens, use_cache=False).logits
    source.set_attn_implementation(before)
    return logits


def logits_of(program: Program, tokens: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    return interpret(program, {"tokens": tokens, "positions": positions})["logits"]


@pytest.mark.parametrize("name", MADE)
def test_logits_are_those_of_the_exported_model(name: str, captured: Captured) -> None:
    program = captured(name)
    verify(program)
    assert program.facts["kind"] == "decoder"
    family = MADE[name][1]
    for shape in ((3, 5 * WINDOW), (1, 1)):
        tokens = torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(2))
        assert relative_error(logits_of(program, tokens), eager(family, tokens)) <= TOLERANCE
    attention = [arguments(node) for node in program.calls(ATTENTION)]
    assert len(attention) == 2 and all(a["causal"] and a["mask"] is None for a in attention)
    assert [a["window"] for a in attention] == {"mistral_window": [WINDOW] * 2, "gemma2": [WINDOW, None]}.get(
        family, [None, None]
    )
    assert len(list(program.calls(HEAD))) == 1


def test_a_wrong_weight_is_seen(file_of: Files, tmp_path: Path) -> None:
    """The comparison above can fail: a norm that is 5 % off."""
    changed = onnx.load(file_of("llama traced"))
    norm = next(t for t in changed.graph.initializer if t.name.endswith("layers.0.input_layernorm.weight"))
    norm.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(norm) * 1.05, norm.name))
    onnx.save(changed, tmp_path / "changed.onnx")
    tokens = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))
    assert relative_error(logits_of(capture(tmp_path / "changed.onnx"), tokens), eager("llama", tokens)) > 1e-3


@pytest.mark.parametrize("name", ["llama traced", "llama exported"])
def test_the_graph_is_that_of_the_folder(name: str, captured: Captured, tmp_path: Path) -> None:
    mine, theirs = captured(name), capture(save(model("llama"), tmp_path))
    for op in (RMS_NORM, ROTARY, ATTENTION):
        assert len(list(mine.calls(op))) == len(list(theirs.calls(op))), op.name
    assert {n.removeprefix("model.") for n in mine.weights if n.endswith("proj.weight")} == {
        n for n in theirs.weights if n.endswith("proj.weight")
    }


def test_a_table_of_positions_gives_the_context(captured: Captured) -> None:
    assert captured("gpt2 traced").facts["context"] == CONTEXT


@pytest.mark.parametrize("recipe", ["none", "finequant", "w4a8"])
def test_generates_what_the_folder_generates(recipe: str, file_of: Files, tmp_path: Path) -> None:
    prompts = [[5, 6, 7, 8], [9], list(range(20, 40))]
    mine = smelt.compile(file_of("llama traced"), recipe)
    theirs = smelt.compile(save(model("llama"), tmp_path), recipe)
    tokens = mine.generate(prompts, max_new_tokens=24)
    assert tokens == theirs.generate(prompts, max_new_tokens=24)
    assert len({tuple(t) for t in tokens}) == len(prompts)


def test_positions_may_stand_anywhere(captured: Captured) -> None:
    """Counting by the file itself was replaced by the input: a text further on gives the same as the model there."""
    program = captured("llama traced")
    tokens = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))
    positions = torch.tensor([[0] * 9, [11] * 9]) + torch.arange(9)
    with torch.no_grad():
        meant = model("llama")(input_ids=tokens, position_ids=positions, use_cache=False).logits
    mine = interpret(program, {"tokens": tokens, "positions": positions})["logits"]
    assert relative_error(mine, meant) <= TOLERANCE
    turned = interpret(program, {"tokens": tokens, "positions": positions * 3})["logits"]
    assert relative_error(turned, meant) > 1e-3, "positions matter"


def test_a_mask_that_looks_ahead_makes_no_decoder(file_of: Files, tmp_path: Path) -> None:
    """The causal comparison of the file turned around: seen is what comes later."""
    changed = onnx.load(file_of("gpt2 traced"))
    for node in changed.graph.node:
        if node.op_type == "LessOrEqual":
            node.op_type = "GreaterOrEqual"
    onnx.save(changed, tmp_path / "ahead.onnx")
    program = capture(tmp_path / "ahead.onnx")
    assert program.facts["kind"] == "module"
    assert "neither causal nor a sliding window" in program.facts["no_decoder"]


def test_a_decoder_with_a_past_and_a_strange_mask_is_refused(file_of: Files, tmp_path: Path) -> None:
    changed = onnx.load(file_of("qwen3 with past"))
    for node in changed.graph.node:
        if node.op_type == "LessOrEqual":
            node.op_type = "GreaterOrEqual"
    onnx.save(changed, tmp_path / "ahead.onnx")
    with pytest.raises(SmeltError, match=r"ahead\.onnx: is a decoder with a cache, but the mask .* is neither causal"):
        capture(tmp_path / "ahead.onnx")
