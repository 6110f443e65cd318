"""smelt as an attention, mask and experts implementation of transformers: what a model calls while it is traced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import SmeltError

NAME = "smelt"
_UNDERSTOOD = {"scaling", "sliding_window", "softcap", "s_aux", "is_causal"}
_HARMLESS = {"position_ids", "use_cache", "cache_position", "output_hidden_states", "return_dict"}
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def register() -> None:
    """Make NAME known to transformers; doing it twice changes nothing."""
    from transformers import AttentionInterface
    from transformers.integrations.moe import ExpertsInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    ExpertsInterface.register(NAME, experts)


@contextmanager
def chosen(model: nn.Module, name: str) -> Iterator[None]:
    """The model with `name` as its attention and experts implementation, in every part of its configuration."""
    configs: dict[int, Any] = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    keys = ("_attn_implementation", "_experts_implementation")
    before = [(c, key, getattr(c, key)) for c in configs.values() for key in keys if hasattr(c, key)]
    for config, key, _ in before:
        setattr(config, key, name)
    try:
        yield
    finally:
        for config, key, value in before:
            setattr(config, key, value)


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [B, H, T, D], key and value [B, G, S, D] → [B, T, H, D]."""
    given = {k: v for k, v in options.items() if v is not None and v is not False and k not in _HARMLESS}
    if not given.get("dropout"):
        given.pop("dropout", None)
    if strange := sorted(given.keys() - _UNDERSTOOD):
        raise SmeltError(f"{type(module).__name__}: its attention takes '{strange[0]}', which cannot be captured yet")
    causal = options.get("is_causal")
    causal = bool(getattr(module, "is_causal", True)) if causal is None else bool(causal)
    window = options.get("sliding_window")
    if window is not None and not causal:
        raise SmeltError(f"{type(module).__name__}: a window that looks both ways cannot be captured yet")
    scaling = options.get("scaling")
    out = torch.ops.smelt.attention(
        query,
        key,
        value,
        attention_mask,
        options.get("s_aux"),
        float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        causal,
        window,
        options.get("softcap"),
    )
    return out.transpose(1, 2).contiguous(), None


def mask(*_: Any, **options: Any) -> torch.Tensor | None:
    """transformers' mask interface: causality and windows are the op's own; only a padding mask [B, S] is passed on.

    That the op's windows are the ones meant here is for the check to find out.
    """
    padding: torch.Tensor | None = options.get("attention_mask")
    return padding


def experts(
    module: Any, hidden: torch.Tensor, picked: torch.Tensor, shares: torch.Tensor, *_: Any, **__: Any
) -> torch.Tensor:
    """transformers' experts interface for gated experts; gate and up rows [E, 2 I, K] stored as one."""
    config = module.config
    act = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if trouble := _experts_trouble(module, act):
        raise SmeltError(f"{type(module).__name__}: experts {trouble} cannot be captured yet")
    operands = (hidden, picked, shares, module.gate_up_proj, module.down_proj, _ACTIVATIONS[str(act)])
    out: torch.Tensor = torch.ops.smelt.experts(*operands)
    return out


def _experts_trouble(module: Any, act: Any) -> str | None:
    if getattr(module, "has_bias", False):
        return "with biases"
    if getattr(module, "is_transposed", False) or not getattr(module, "is_concatenated", True):
        return "with transposed or interleaved weights"
    if not getattr(module, "has_gate", True):
        return "without a gate"
    if getattr(module, "has_post_expert_norm", False):
        return "with a norm behind them"
    if getattr(getattr(type(module), "_apply_gate", None), "__name__", "") != "_default_apply_gate":
        return "with a gate function of their own"
    return None if act in _ACTIVATIONS else f"with the activation {act}"
