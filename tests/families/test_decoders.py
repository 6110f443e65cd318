"""Decoder families from their folders: logits and greedy tokens equal transformers', through the compiled target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import smelt
from smelt.ir.capture import capture
from smelt.ir.capture.variants import TOLERANCE, relative_error
from smelt.ir.interpret import interpret
from smelt.ir.ops import ATTENTION, arguments
from smelt.model import Compiled

from .zoo import CONFIGS, GENERATING, VOCABULARY, WINDOW, model, save

NEW = 64
LENGTHS = (1, 5, 9, 17, 30)
Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Saves a family once."""
    root, saved = tmp_path_factory.mktemp("families"), dict[str, Path]()

    def folder(family: str) -> Path:
        if family not in saved:
            saved[family] = save(model(family), root / family)
        return saved[family]

    return folder


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]


def greedy(source: Any, prompt: list[int]) -> list[int]:
    """What `model.generate` continues a prompt with."""
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tokens: list[int] = source.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()
    return tokens[len(prompt) :]


@torch.no_grad()
def eager_logits(source: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] of transformers' eager attention."""
    before = source.config._attn_implementation
    source.set_attn_implementation("eager")
    logits: torch.Tensor = source(input_ids=tokens, use_cache=False).logits
    source.set_attn_implementation(before)
    return logits


@pytest.mark.parametrize("family", GENERATING)
def test_generates_what_transformers_generates(family: str, folder_of: Folders, prompts: list[list[int]]) -> None:
    compiled = smelt.compile(folder_of(family), "none")
    expected = [greedy(model(family), prompt) for prompt in prompts]
    assert compiled.generate(prompts, max_new_tokens=NEW) == expected, "as one ragged batch"
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert compiled.generate(prompt, max_new_tokens=NEW) == tokens, f"a prompt of {len(prompt)} by itself"
    assert len({tuple(tokens) for tokens in expected}) == len(prompts), "the prompts should not all end alike"


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_torch_target_generates_the_same(family: str, folder_of: Folders, prompts: list[list[int]]) -> None:
    compiled = smelt.compile(folder_of(family), "none", target="torch")
    assert compiled.generate(prompts[:3], max_new_tokens=NEW) == [greedy(model(family), p) for p in prompts[:3]]


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_are_transformers_eager_logits(family: str, folder_of: Folders) -> None:
    program = capture(folder_of(family))
    tokens = torch.randint(0, VOCABULARY, (3, 5 * WINDOW), generator=torch.Generator().manual_seed(2))
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    mine = interpret(program, {"tokens": tokens, "positions": positions})["logits"]
    assert relative_error(mine, eager_logits(model(family), tokens)) <= TOLERANCE
    assert program.facts["capture_error"] <= TOLERANCE


def test_a_model_in_memory_is_captured_like_its_folder(folder_of: Folders) -> None:
    tokens = torch.arange(20)[None] % VOCABULARY
    inputs = {"tokens": tokens, "positions": torch.arange(20)[None]}
    source = model("qwen3").train()
    try:
        program = capture(source)
        assert all(part.training for part in source.modules()), "training mode comes back"
    finally:
        source.eval()
    assert torch.equal(interpret(program, inputs)["logits"], interpret(capture(folder_of("qwen3")), inputs)["logits"])


def test_windows_softcaps_and_sinks_are_arguments_of_attention(folder_of: Folders) -> None:
    def told(family: str, name: str) -> list[Any]:
        return [arguments(node)[name] for node in capture(folder_of(family)).calls(ATTENTION)]

    assert told("mistral", "window") == [None, None]
    assert told("mistral_window", "window") == [WINDOW, WINDOW]
    assert told("gemma2", "window") == [WINDOW, None]
    assert told("gemma2", "softcap") == [2.0, 2.0]
    assert [sink is not None for sink in told("granite_swa", "sinks")] == [True, True, True, True]


def test_tied_heads_are_stored_once(folder_of: Folders) -> None:
    program = capture(folder_of("gemma2"))
    assert "lm_head.weight" not in program.weights
    assert len(program.uses("model.embed_tokens.weight")) == 2


def test_a_compiled_family_is_what_users_hold(folder_of: Folders) -> None:
    compiled = smelt.compile(folder_of("mistral_window"), "none")
    assert isinstance(compiled, Compiled)
    assert compiled.program.facts["source"] == "mistral_window"
    assert compiled.context == 128
