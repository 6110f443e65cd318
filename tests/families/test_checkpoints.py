"""Checkpoints whose tensors are named or cut differently from the model's own are read as transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from smelt.ir.capture import capture
from smelt.ir.errors import SmeltError
from smelt.ir.interpret import interpret
from smelt.ir.program import Program

from .zoo import _NO_GROUPS, VOCABULARY, config, model, random_model, save

TOKENS = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))


def logits(program: Program) -> torch.Tensor:
    positions = torch.arange(TOKENS.shape[1]).expand(TOKENS.shape)
    return interpret(program, {"tokens": TOKENS, "positions": positions})["logits"]


def rewritten(folder: Path, change: dict[str, torch.Tensor]) -> Path:
    save_file(change, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("family", "part"),
    [("mixtral", "block_sparse_moe.experts.3.w1.weight"), ("qwen3_moe", "mlp.experts.3.gate_proj.weight")],
)
def test_experts_stored_one_by_one_are_merged_on_demand(family: str, part: str, tmp_path: Path) -> None:
    folder = save(model(family), tmp_path)
    assert f"model.layers.0.{part}" in load_file(folder / "model.safetensors"), "transformers saves the original names"
    program = capture(folder)
    merged = program.weights["model.layers.0.mlp.experts.gate_up_proj"]
    assert torch.equal(merged.dense(), model(family).model.layers[0].mlp.experts.gate_up_proj)
    assert merged.parts["data"] is not merged.parts["data"], "nothing stays resident"
    assert torch.equal(logits(program), logits(capture(model(family))))


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = save(model("mixtral"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    with pytest.raises(SmeltError, match=r"'model.layers.1.mlp.experts.gate_up_proj' cannot be put together"):
        capture(rewritten(folder, tensors))


def test_names_without_the_base_models_prefix_are_found(tmp_path: Path) -> None:
    folder = save(model("gpt2"), tmp_path)
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(folder / "model.safetensors").items()}
    assert "h.0.attn.c_attn.weight" in tensors
    assert torch.equal(logits(capture(rewritten(folder, tensors))), logits(capture(model("gpt2"))))


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    model("llama").save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(capture(tmp_path)), logits(capture(model("llama"))))


def test_half_precision_is_widened(tmp_path: Path) -> None:
    folder = save(random_model(config("llama")).to(torch.bfloat16), tmp_path)
    program = capture(folder)
    assert str(program.weights["model.norm.weight"].encoding) == "dense(dtype=bfloat16)"
    half = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert torch.equal(logits(program), logits(capture(half))), "a model in memory is widened in the same way"
    assert half.dtype == torch.bfloat16


def test_a_tied_head_may_lie_under_either_name(tmp_path: Path) -> None:
    tied = random_model(transformers.LlamaConfig(**(config("llama").to_dict() | {"tie_word_embeddings": True})))
    folder = save(tied, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    assert torch.equal(logits(capture(rewritten(folder, tensors))), logits(capture(tied)))


def test_a_tie_that_the_checkpoint_contradicts_is_refused(tmp_path: Path) -> None:
    folder = save(model("llama"), tmp_path)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | {"tie_word_embeddings": True}))
    with pytest.raises(SmeltError, match=r"ties 'model.embed_tokens.weight' and 'lm_head.weight'.*tie_word_embeddings"):
        capture(folder)


def test_what_an_output_does_not_need_may_be_missing(tmp_path: Path) -> None:
    folder = save(random_model(transformers.BertConfig(**_NO_GROUPS), transformers.AutoModel), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    needless = [name for name in tensors if name.startswith("pooler.")]
    assert needless
    program = capture(rewritten(folder, {k: v for k, v in tensors.items() if k not in needless}))
    assert not any("pooler" in name for name in program.weights)
