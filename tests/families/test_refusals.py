"""Families that capture has no words for are refused, each with the construct that is missing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from smelt.ir.capture import capture
from smelt.ir.capture.hf import capture_hf
from smelt.ir.errors import SmeltError

from .zoo import _NO_GROUPS, _SIZES, random_model

_TINY = {"hidden_size": 64, "vocab_size": 97}
_EIGHT = [1.0] * 8
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": _EIGHT,
    "long_factor": _EIGHT,
    "original_max_position_embeddings": 64,
    "factor": 2.0,
}
_GPTJ = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 97, "n_positions": 128, "rotary_dim": 8}

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bloom": ("BloomConfig", {**_TINY, "n_layer": 2, "n_head": 4}, "ALiBi attention bias"),
    "falcon": (
        "FalconConfig",
        {**_TINY, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
        "ALiBi attention bias",
    ),
    "mpt": ("MptConfig", {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 97}, "ALiBi attention bias"),
    "gpt_oss": ("GptOssConfig", {**_SIZES, "num_local_experts": 4, "head_dim": 16}, "experts with biases"),
    "mamba": ("MambaConfig", {**_TINY, "num_hidden_layers": 2}, "state-space layers"),
    "falcon_h1": (
        "FalconH1Config",
        {**_SIZES, "mamba_n_heads": 4, "mamba_d_ssm": 64, "mamba_d_head": 16},
        "state-space",
    ),
    "rwkv": ("RwkvConfig", {**_TINY, "num_hidden_layers": 2, "attention_hidden_size": 64}, "recurrent layers"),
    "qwen3_next": (
        "Qwen3NextConfig",
        {**_SIZES, "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
        "linear attention layers",
    ),
    "llama4": (
        "Llama4TextConfig",
        {**_SIZES, "intermediate_size_mlp": 128, "num_local_experts": 2},
        "chunked attention",
    ),
    "phi3 with longrope": ("Phi3Config", {**_SIZES, "rope_parameters": _LONG}, "length of the text.*longrope"),
    "llama with dynamic scaling": (
        "LlamaConfig",
        {**_SIZES, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "length of the text.*dynamic",
    ),
    "gptj": ("GPTJConfig", _GPTJ, "attention is its own code"),
    "falcon without alibi": (
        "FalconConfig",
        {**_TINY, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False},
        "attention is its own code",
    ),
    "bert as a decoder": ("BertConfig", _NO_GROUPS, "looks both ways.*as an encoder"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_names_what_is_missing(family: str) -> None:
    name, options, reason = REFUSED[family]
    kind = getattr(transformers, name, None)
    if kind is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    with pytest.raises(SmeltError, match=reason):
        capture_hf(random_model(kind(**options)))


def test_an_encoder_with_a_decoder_is_refused() -> None:
    config = transformers.T5Config(d_model=64, d_ff=128, num_layers=2, num_heads=4, vocab_size=97, d_kv=16)
    with pytest.raises(SmeltError, match="an encoder and a decoder"):
        capture(random_model(config, transformers.AutoModelForSeq2SeqLM))


def test_relative_positions_are_refused() -> None:
    options = {**_NO_GROUPS, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pad_token_id": 0}
    with pytest.raises(SmeltError, match="relative position biases"):
        capture(random_model(transformers.DebertaV2Config(**options), transformers.AutoModel))


def test_windows_that_look_both_ways_are_refused() -> None:
    options = {**_NO_GROUPS, "global_attn_every_n_layers": 2, "local_attention": 8, "pad_token_id": 0}
    with pytest.raises(SmeltError, match="window that looks both ways"):
        capture(random_model(transformers.ModernBertConfig(**options), transformers.AutoModel))


def test_experts_say_what_is_strange_about_them() -> None:
    class Odd(torch.nn.Module):
        is_concatenated, is_transposed, has_bias, has_gate, has_post_expert_norm = True, False, False, True, False

        def _apply_gate(self, x: torch.Tensor) -> torch.Tensor:
            return x

    from smelt.ir.capture.interfaces import experts

    odd = Odd()
    odd.config = transformers.LlamaConfig(hidden_act="silu")
    x = torch.zeros(1, 4)
    with pytest.raises(SmeltError, match="Odd: experts with a gate function of their own"):
        experts(odd, x, x, x)
    odd.is_transposed = True
    with pytest.raises(SmeltError, match="transposed or interleaved"):
        experts(odd, x, x, x)


def test_an_attention_argument_nobody_knows_is_refused() -> None:
    from smelt.ir.capture.interfaces import attention

    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(SmeltError, match="Linear: its attention takes 'tree_bias'"):
        attention(torch.nn.Linear(1, 1), x, x, x, tree_bias=x)
    with pytest.raises(SmeltError, match="takes 'dropout'"):
        attention(torch.nn.Linear(1, 1), x, x, x, dropout=0.1)
