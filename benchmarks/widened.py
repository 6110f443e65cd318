"""A small Llama at a larger shape that answers as it does: the bytes of a step grow, and not one answer changes.

What drafts win depends on how often they are right, which only a trained model shows, and on what a step of many tokens
costs beside one of a single token, which a model that fits the caches cannot show. The widened model has both.

Every number of the stream stands there several times, heads and neurons likewise, and what reads copies is divided by
their number, a power of two, so that weights keep their digits. Layers between the old ones add nothing: their last
products are zero, and cost what others cost.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from smelt.ir.errors import SmeltError


class Shape(NamedTuple):
    """What a Llama is widened to: that of 430 M parameters with a vocabulary of 32000."""

    hidden: int = 1024
    layers: int = 24
    heads: int = 16
    kv_heads: int = 4
    intermediate: int = 4096


LARGE = Shape()


def widened(source: Path, folder: Path, shape: Shape = LARGE) -> None:
    """Write the Llama of `source` at a shape, unless it is there, in float16; a shard a layer.

    Raises SmeltError where the shape does not hold each of its numbers a power of two times.
    """
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    names: dict[str, str] = {}
    held = {name: value.float() for name, value in load_file(source / "model.safetensors").items()}
    for number, tensors in enumerate(_shards(config, held, shape)):
        shard = f"model-{number:05}.safetensors"
        save_file({name: t.half().contiguous() for name, t in tensors.items()}, folder / shard, {"format": "pt"})
        names |= dict.fromkeys(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(source / name, folder / name)
    told = config | {
        "hidden_size": shape.hidden, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "intermediate_size": shape.intermediate, "head_dim": _head(config),
        "tie_word_embeddings": False, "dtype": "float16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(told))  # last: it says that the rest is complete


def _head(config: dict[str, int]) -> int:
    """Channels of a head."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _shards(config: dict[str, int], held: dict[str, torch.Tensor], shape: Shape) -> Iterator[dict[str, torch.Tensor]]:
    """The weights of the model around its layers, then a layer at a time."""
    stream = _copies(config["hidden_size"], shape.hidden)
    neurons = _copies(config["intermediate_size"], shape.intermediate)
    kv = torch.arange(shape.kv_heads) * config["num_key_value_heads"] // shape.kv_heads  # which head each head is
    group, old = shape.heads // shape.kv_heads, config["num_attention_heads"] // config["num_key_value_heads"]
    heads = (kv[:, None] * old + torch.arange(group) % old).flatten()
    queries, keys = (_channels(each, _head(config)) for each in (heads, kv))

    embedding = held["model.embed_tokens.weight"]
    yield {
        "model.embed_tokens.weight": embedding[:, stream],
        "model.norm.weight": held["model.norm.weight"][stream],
        "lm_head.weight": _reading(held.get("lm_head.weight", embedding), stream),
    }
    every = shape.layers // config["num_hidden_layers"]
    for number in range(shape.layers):
        layer = f"model.layers.{number // every}."
        here = {
            "input_layernorm": held[layer + "input_layernorm.weight"][stream],
            "post_attention_layernorm": held[layer + "post_attention_layernorm.weight"][stream],
        }
        for name, rows, columns in (
            ("self_attn.q_proj", queries, stream),
            ("self_attn.k_proj", keys, stream),
            ("self_attn.v_proj", keys, stream),
            ("self_attn.o_proj", stream, queries),
            ("mlp.gate_proj", neurons, stream),
            ("mlp.up_proj", neurons, stream),
            ("mlp.down_proj", stream, neurons),
        ):
            here[name] = _reading(held[f"{layer}{name}.weight"], columns)[rows]
        if number % every:
            here |= {name: torch.zeros_like(here[name]) for name in ("self_attn.o_proj", "mlp.down_proj")}
        yield {f"model.layers.{number}.{name}.weight": value for name, value in here.items()}


def _copies(old: int, new: int) -> torch.Tensor:
    """Which of so many each of the new ones is: all of them a power of two times, the first ones twice as often."""
    least = 1 << max(0, (new // old).bit_length() - 1)
    again = new // least - old  # how many stand there twice as often
    if not 0 <= again <= old or new % least:
        raise SmeltError(f"{new} do not hold each of {old} a power of two times")
    return torch.cat([torch.arange(old).repeat(least), torch.arange(again).repeat(least)])


def _reading(weight: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """A matrix that reads copies of its columns, each divided by their number."""
    return (weight / torch.bincount(columns, minlength=weight.shape[1]))[:, columns]


def _channels(heads: torch.Tensor, size: int) -> torch.Tensor:
    return (heads[:, None] * size + torch.arange(size)).flatten()
