"""The ort style: onnxruntime's own operators, and a folder that onnxruntime-genai loads and generates from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...ir.cache.plan import Site
from ...ir.errors import SmeltError
from ...ir.program import Program
from .builder import CONTRIB, Builder, Value, onnx_type
from .genai import genai_files
from .graph import drop_dead
from .standard import Standard

CACHE = "float32"  # the one floating type that the CPU kernel holds; for float16 whole caches are cast at every step
HEAD_STEP = 8  # GroupQueryAttention wants dims of heads in eights


@dataclass(frozen=True)
class Ort:
    """A decoder's step with `input_ids`, `attention_mask` and a cache of two tensors a layer.

    int8_activations: products round what enters them to int8, as onnxruntime-genai's own builder asks for: prompts are
        read in half the time and logits are off by a hundredth or more. Without, they agree to float32's rounding.
    """

    int8_activations: bool = False

    @property
    def name(self) -> str:
        """What forms are registered under."""
        return "ort"

    def inputs(self, builder: Builder, program: Program) -> dict[str, Value]:
        """Names that onnxruntime-genai knows; what the graph does not read is dropped at the end."""
        if program.cache is None:
            return Standard().inputs(builder, program)
        whole, kind = onnx_type(torch.int64), onnx_type(getattr(torch, CACHE))
        places = {str(node.target): node for node in program.graph.nodes if node.op == "placeholder"}
        names = {"tokens": "input_ids", "positions": "position_ids"}
        made = {}
        for name, node in places.items():
            if name not in names:
                raise SmeltError(
                    f"{program.name}: onnxruntime-genai has no input '{name}': compile without the step that adds it "
                    "(such as sample.superposed), or run the artefact with smelt"
                )
            shape = node.meta["shape"]
            made[name] = Value(builder.input(names[name], whole, shape), shape, torch.int64)
        batch = made["tokens"].shape[0]  # type: ignore[index]  # [B, T]
        builder.input("attention_mask", whole, (batch, "total"))
        for at, site in enumerate(program.cache.sites):
            if why := _refusal(site):
                raise SmeltError(
                    f"{program.name}: layer {site.layer}: {why}, which GroupQueryAttention cannot say; "
                    "use style standard"
                )
            for role in ("key", "value"):
                builder.input(f"past_key_values.{at}.{role}", kind, (batch, site.kv_heads, "past", site.key_dim))
        return made

    def outputs(self, builder: Builder, program: Program, results: Mapping[str, Value]) -> None:
        """Logits and the grown cache; positions are no input where the operators count them themselves."""
        if program.cache is None:
            return Standard().outputs(builder, program, results)
        for name, value in results.items():
            if name != "logits":
                builder.note(
                    f"output '{name}' is left out: onnxruntime-genai has no loop for it; style standard has it"
                )
                continue
            assert value.shape is not None
            builder.output(name, value, onnx_type(value.dtype), value.shape)
        if program.decode is not None:
            builder.note("onnxruntime-genai decodes token by token; smelt.json describes the recipe's drafter")
        if program.choice is not None:
            builder.note(
                "onnxruntime-genai draws by its own options; smelt.json describes the recipe's choice of tokens"
            )
        kind = onnx_type(getattr(torch, CACHE))
        batch = results["logits"].shape[0]  # type: ignore[index]  # [B, T, V]
        for at, site in enumerate(program.cache.sites):
            for role in ("key", "value"):
                dims = (batch, site.kv_heads, "total", site.key_dim)
                builder.outputs.append(_info(f"present.{at}.{role}", kind, dims))
            if site.dense != CACHE:
                builder.note(f"the cache is kept in {CACHE}, where the recipe says {site.dense}")
        needed = drop_dead(builder)
        builder.inputs[:] = [value for value in builder.inputs if value.name in needed]

    def manifest(self, builder: Builder, program: Program) -> dict[str, Any]:
        """How products round, and what the cache is."""
        if program.cache is None:
            return {}
        return {"cache": {"kind": "past_key_values", "dtype": CACHE}, "int8_activations": self.int8_activations}

    def files(self, builder: Builder, program: Program, assets: Mapping[str, bytes]) -> Mapping[str, bytes]:
        """The tokenizer's files, and of a decoder `genai_config.json`."""
        if program.cache is None:
            return assets
        return genai_files(program, [value.name for value in builder.inputs], assets)

    def node(self, builder: Builder, kind: str, inputs: Sequence[str], outputs: Sequence[str], **options: Any) -> None:
        """A node of onnxruntime's own with outputs left out or named."""
        from onnx import helper

        names = list(inputs)
        while not names[-1]:
            names.pop()
        made = helper.make_node(kind, names, list(outputs), name=f"{outputs[0]}:{kind}", domain=CONTRIB, **options)
        builder.nodes.append(made)
        builder.domains.add(CONTRIB)

    def lengths(self, builder: Builder) -> tuple[str, str]:
        """Last place of each row `[B]` and the length of the longest, from the attention mask; int32."""
        whole = onnx_type(torch.int32)
        tokens = builder.op("ReduceSum", "attention_mask", builder.const([1]), keepdims=0)
        last = builder.op("Cast", builder.op("Sub", tokens, builder.const([1])), to=whole)
        size = builder.op("Squeeze", builder.op("Shape", "attention_mask", start=1, end=2))
        return last, builder.op("Cast", size, to=whole)


def _refusal(site: Site) -> str | None:
    if site.tail is not None:
        return "its cache drops tokens, or encodes them by scales of their own, as they leave the tail"
    if site.key_dim != site.value_dim:
        return f"its keys have {site.key_dim} dims and its values {site.value_dim}"
    return f"its heads have {site.key_dim} dims, not in eights" if site.key_dim % HEAD_STEP else None


def _info(name: str, kind: int, dims: Sequence[Any]) -> Any:
    from onnx import helper

    return helper.make_tensor_value_info(name, kind, [size if isinstance(size, int) else str(size) for size in dims])
