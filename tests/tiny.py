"""A tiny Llama of random weights with the reference model's tokenizer, as a folder and as an artefact; made once."""

import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import smelt

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 4096,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "dtype": "float32",
    "eos_token_id": 0,
}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def write_model(folder: Path, **config: Any) -> Path:
    """A model folder; `config` changes the configuration and not the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=random) / shape[-1] ** 0.5 for name, shape in _shapes().items()}
    tensors |= {name: torch.ones_like(value) for name, value in tensors.items() if "norm" in name}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    for name in TOKENIZER:
        shutil.copy(smelt.reference_model() / name, folder / name)
    return folder


@functools.cache
def model() -> Path:
    """The model's folder, to be read only."""
    return write_model(_place() / "model")


@functools.cache
def artefact(recipe: str = "none") -> Path:
    """The model compiled by a recipe that needs no text; to be read only."""
    out = _place() / f"{recipe}.smelt"
    smelt.compile(model(), recipe).save(out)
    return out


def tokens(count: int) -> str:
    """Text of at least so many tokens."""
    return "def f(x):\n    return x + 1\n" * (count // 8 + 1)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="smelt-tiny-")  # kept by the cache until the interpreter ends


def _place() -> Path:
    return Path(_folder().name)


def _shapes() -> dict[str, tuple[int, ...]]:
    hidden, inner, narrow = 64, 128, 32
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (4096, hidden), "model.norm.weight": (hidden,)}
    for layer in range(2):
        for name, shape in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (narrow, hidden),
            "self_attn.v_proj": (narrow, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    return shapes
