"""Exports of the tiny models by torch's two exporters, quiet and made once."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from ...families.zoo import model

TOKENS = torch.ones(2, 7, dtype=torch.int64)


class Logits(nn.Module):
    """A decoder as a function of its tokens, and of an attention mask if there is one."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.model = source

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits


class WithPast(nn.Module):
    """A decoder as its users run it: past keys and values in, present ones out."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.model = source

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, *past: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        cache = DynamicCache(config=self.model.config)
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return (out.logits, *(t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)))


def by_trace(family: str, path: Path, opset: int) -> Path:
    """The older exporter: TorchScript, with attention written out, tokens and attention mask as inputs."""
    source = model(family)
    before = source.config._attn_implementation
    source.set_attn_implementation("eager")
    sizes = {0: "batch", 1: "sequence"}
    with _quiet():
        torch.onnx.export(
            Logits(source).eval(),
            (TOKENS, TOKENS),
            str(path),
            dynamo=False,
            opset_version=opset,
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_axes={"input_ids": sizes, "attention_mask": sizes, "logits": sizes},
        )
    source.set_attn_implementation(before)
    return path


def by_export(family: str, path: Path, opset: int) -> Path:
    """The newer exporter, tokens alone as input."""
    sizes = {0: "batch", 1: "sequence"}
    with _quiet():
        program: Any = torch.onnx.export(
            Logits(model(family)).eval(),
            (TOKENS,),
            dynamo=True,
            opset_version=opset,
            input_names=["input_ids"],
            output_names=["logits"],
            dynamic_shapes=(sizes, None)[:1],
            verbose=False,
        )
        program.save(str(path))
    return path


def with_past(family: str, path: Path, opset: int) -> Path:
    """The newer exporter, with past keys and values, named as optimum names them."""
    source = model(family)
    config = source.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    parts = [f"{layer}.{part}" for layer in range(config.num_hidden_layers) for part in ("key", "value")]
    past = tuple(torch.randn(2, heads, 3, size) for _ in parts)
    tokens, positions = torch.ones(2, 5, dtype=torch.int64), torch.arange(3, 8).expand(2, -1).contiguous()
    tokens_shape, cache_shape = {0: "batch", 1: "sequence"}, {0: "batch", 2: "past"}
    with _quiet():
        program: Any = torch.onnx.export(
            WithPast(source).eval(),
            (tokens, torch.ones(2, 8, dtype=torch.int64), positions, *past),
            dynamo=True,
            opset_version=opset,
            input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{p}" for p in parts)],
            output_names=["logits", *(f"present.{p}" for p in parts)],
            dynamic_shapes=(tokens_shape, {0: "batch", 1: "total"}, tokens_shape, tuple(cache_shape for _ in past)),
            verbose=False,
        )
        program.save(str(path))
    return path


@contextlib.contextmanager
def _quiet() -> Any:
    """Without what exporters print and warn about."""
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
