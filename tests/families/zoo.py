"""Tiny random models of many families, the same in every session, and their folders."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY, CONTEXT, WINDOW = 97, 128, 8

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_NO_GROUPS = {key: value for key, value in _SIZES.items() if key != "num_key_value_heads"}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
_OPT = {**_NO_GROUPS, "ffn_dim": 128, "word_embed_proj_dim": 64}
_OPT.pop("intermediate_size")

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _SIZES),
    "mistral": ("MistralConfig", {**_SIZES, "sliding_window": None}),
    "mistral_window": ("MistralConfig", {**_SIZES, "sliding_window": WINDOW}),
    "qwen2": ("Qwen2Config", _SIZES),
    "qwen3": ("Qwen3Config", {**_SIZES, "head_dim": 32}),
    "gemma2": ("Gemma2Config", {**_SIZES, "head_dim": 32, "sliding_window": WINDOW, "attn_logit_softcapping": 2.0}),
    "gpt2": ("GPT2Config", _GPT2),
    "opt": ("OPTConfig", _OPT),
    "phi3": ("Phi3Config", _SIZES),
    "gpt_neox": ("GPTNeoXConfig", _NO_GROUPS),
    "mixtral": ("MixtralConfig", {**_SIZES, "num_local_experts": 4}),
    # attention sinks, windows in three layers of four
    "granite_swa": ("GraniteSWAConfig", {**_SIZES, "num_hidden_layers": 4, "sliding_window": WINDOW}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    ),
    "cohere": ("CohereConfig", _SIZES),
    "gemma3": ("Gemma3TextConfig", {**_SIZES, "head_dim": 16, "sliding_window": WINDOW}),
    "granite": ("GraniteConfig", _SIZES),
    "olmo2": ("Olmo2Config", _SIZES),
    "stablelm": ("StableLmConfig", _SIZES),
    "starcoder2": ("Starcoder2Config", _SIZES),
}
# every one generates, token for token, through the compiled target
GENERATING = (
    "llama",
    "mistral",
    "mistral_window",
    "qwen2",
    "qwen3",
    "gemma2",
    "gpt2",
    "opt",
    "phi3",
    "gpt_neox",
    "mixtral",
    "granite_swa",
)


def config(family: str) -> Any:
    """The configuration of a family; skips nothing: an unknown name is a fault of the test."""
    name, options = CONFIGS[family]
    return getattr(transformers, name)(**options)


@cache
def model(family: str) -> Any:
    """The model in evaluation mode; shared, so leave it as it is."""
    return random_model(config(family))


def random_model(config: Any, auto: Any = transformers.AutoModelForCausalLM) -> Any:
    """A model whose weights are large enough for its outputs to tell right from wrong."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    generator = torch.Generator().manual_seed(0)
    built = auto.from_config(config, dtype=torch.float32).eval()
    for parameter in built.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.08
        parameter.data = noise + (parameter.data.mean() if parameter.dim() == 1 else 0.0)
    return built


def save(built: Any, folder: Path) -> Path:
    """A model folder as transformers writes it."""
    built.save_pretrained(folder)
    return folder
