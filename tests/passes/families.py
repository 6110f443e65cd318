"""Small random models of many families, captured once a session; and text that every machine has."""

from __future__ import annotations

import importlib
import inspect
import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx

from smelt.ir.interpret import interpret
from smelt.ir.program import Program
from smelt.ir.weight import Weight

VOCABULARY = 97
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 16}),
    "gemma2": ("Gemma2Config", {**_GROUPED, "head_dim": 16, "sliding_window": 8}),
    "phi3": ("Phi3Config", _GROUPED),
    "cohere": ("CohereConfig", _GROUPED),
    "olmo2": ("Olmo2Config", _GROUPED),
    "mixtral": ("MixtralConfig", {**_GROUPED, "num_local_experts": 4}),
    "gpt_neox": ("GPTNeoXConfig", _SIZES),
    "bert": ("BertConfig", _SIZES),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_inner": 128, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY}),
    "opt": ("OPTConfig", {**_SIZES, "ffn_dim": 128, "word_embed_proj_dim": 64}),
}


def captured(family: str) -> Program:
    """A Program of this family that the caller may edit; weights are random and the same in every session."""
    return _captured(family).fork()


@cache
def _captured(family: str) -> Program:
    import transformers

    from smelt.ir.capture.hf import capture_hf

    name, sizes = _CONFIGS[family]
    config = getattr(transformers, name)(**sizes)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    kind = transformers.AutoModel if family == "bert" else transformers.AutoModelForCausalLM
    model = kind.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.08
        parameter.data = noise + (parameter.data.mean() if parameter.dim() == 1 else 0.0)
    return capture_hf(model)


def random_tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """int64 [rows, length]."""
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def answer(program: Program, tokens: torch.Tensor) -> torch.Tensor:
    """The logits or hidden states of a model of text."""
    given = {
        "tokens": tokens,
        "positions": torch.arange(tokens.shape[1]).expand(tokens.shape),
        "mask": torch.ones_like(tokens),
    }
    outputs = interpret(program, {name: given[name] for name in program.inputs})
    return next(iter(outputs.values()))


def source_tokens(folder: Path, modules: str, rows: int, length: int) -> torch.Tensor:
    """Source of modules of Python's own library, named with spaces between them, in the tokens of a model's folder."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "".join(inspect.getsource(importlib.import_module(name)) for name in modules.split())
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return torch.tensor(ids[: rows * length]).reshape(rows, length)


class Sketch:
    """Builds a Program over one input, `tokens` int64 [B, T] unless told, by calling ops one after the other."""

    def __init__(self, **facts: Any) -> None:
        self.graph, self.weights, self.facts = fx.Graph(), {}, facts
        self.random = torch.Generator().manual_seed(0)
        self.tokens = self.graph.placeholder("tokens")

    def weight(self, name: str, *shape: int, value: torch.Tensor | None = None) -> fx.Node:
        """A weight of random values, or of these."""
        self.weights[name] = Weight.of(torch.randn(shape, generator=self.random) if value is None else value)
        return self.graph.create_node("get_attr", name)

    def call(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of a dialect op or an ATen overload."""
        return self.graph.call_function(getattr(op, "target", op), args, kwargs)

    def program(self, **outputs: fx.Node) -> Program:
        """The finished Program, without what no output needs."""
        self.graph.output(outputs)
        made = Program("sketch", self.graph, self.weights, self.facts)
        made.prune()
        return made
