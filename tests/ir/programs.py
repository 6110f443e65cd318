"""Small programs for tests: tiny random models of several families, captured once a session, and ways to change one."""

from __future__ import annotations

import logging
import math
from functools import cache
from typing import Any

import torch
from torch import fx

from smelt.ir import decode as drafts
from smelt.ir.cache import CachePlan, Select, Site
from smelt.ir.capture.hf import capture_hf
from smelt.ir.decode import DecodePlan, Tree
from smelt.ir.encoding import Affine, Encoding
from smelt.ir.ops import ATTENTION, CACHED_ATTENTION, LINEAR, arguments
from smelt.ir.program import Program, Record
from smelt.ir.shapes import derive
from smelt.ir.weight import Weight

_SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "phi3": ("Phi3Config", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 8}),
}
FAMILIES = ("gpt2", *_MORE)


def captured(family: str) -> Program:
    """A program of this family that the caller may edit; weights are random, and the same in every session."""
    return _captured(family).fork()


@cache
def _captured(family: str) -> Program:
    import transformers

    if family == "gpt2":
        config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=97, n_positions=128)
    else:
        name, more = _MORE[family]
        config = getattr(transformers, name)(**_SIZES, **more)
    generator = torch.Generator().manual_seed(0)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.08
        parameter.data = noise + (parameter.data.mean() if parameter.dim() == 1 else 0.0)
    program = capture_hf(model)
    derive(program)
    return program


def cached(program: Program, **options: Any) -> Program:
    """The program over a cache plan of one site a layer, each made with these options."""
    program = program.fork()
    sites = []
    for layer, node in enumerate(program.calls(ATTENTION)):
        a = arguments(node)
        (_, heads, _, key_dim), (_, kv_heads, _, value_dim) = a["query"].meta["shape"], a["value"].meta["shape"]
        sites.append(Site(layer, heads, kv_heads, key_dim, value_dim, a["window"], **options))
        node.target = CACHED_ATTENTION.target
        node.args = (a["query"], a["key"], a["value"], a["sinks"], layer, a["scale"], a["window"], a["softcap"])
    program.cache = CachePlan(tuple(sites))
    return program


def quantized(program: Program, encoding: Encoding) -> Program:
    """The program with the weights of its linear ops in this encoding."""
    program = program.fork()
    for node in program.calls(LINEAR):
        name = arguments(node)["weight"].target
        program.weights[name] = program.weights[name].encoded(encoding)
    return program


def rich() -> Program:
    """A program with everything that a program may carry."""
    program = cached(
        quantized(captured("llama"), Affine(4, 32)),
        sink=4,
        tail=64,
        keys=Affine(8, 32, "channel", True, "float32"),
        values=Affine(8, 16),
        select=Select("key_norm", 0.5, 256),
    )
    record = Record(1, "weights.quantize", {"bits": 4, "only": ("mlp",)}, {"kl": 1.5e-3, "worst": math.inf, "left": []})
    other = Record(2, "cache.insert", {}, {"done": True, "why": None})
    program.history = (record, other)
    program.origin = {"model.layers.0.mlp.up_proj.weight": record, "cache": other, "lm_head.weight": other}
    program.decode = DecodePlan(drafts.Recycle(Tree.from_paths([(0,), (1,), (0, 0)]), 4))
    derive(program)
    return program


def one_call(target: Any, shapes: dict[str, tuple[Any, ...]], *args: Any, **kwargs: Any) -> Program:
    """A program of one call: float32 inputs by name and shape, which `args` may name as `$name`."""
    graph = fx.Graph()
    nodes = {name: graph.placeholder(name) for name in shapes}

    def node_of(argument: Any) -> Any:
        if isinstance(argument, list):
            return [node_of(member) for member in argument]
        return nodes[argument[1:]] if isinstance(argument, str) and argument.startswith("$") else argument

    graph.output({"y": graph.call_function(target, tuple(map(node_of, args)), kwargs)})
    inputs = {name: {"shape": list(shape), "dtype": "float32"} for name, shape in shapes.items()}
    return Program("one", graph, {}, {"inputs": inputs})


def affine_layer() -> Program:
    """y = x Wᵀ + b on [B, 4]: the smallest program with weights."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    weights = {"layer.weight": Weight.of(torch.arange(12.0).reshape(3, 4)), "layer.bias": Weight.of(torch.ones(3))}
    read = [graph.create_node("get_attr", name) for name in weights]
    graph.output({"y": graph.call_function(LINEAR.target, (x, *read))})
    return Program("layer", graph, weights, {"inputs": {"x": {"shape": ["B", 4], "dtype": "float32"}}})
