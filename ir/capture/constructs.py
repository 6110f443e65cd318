"""What capture cannot express, recognised by a model's configuration and modules before anything is traced."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..errors import SmeltError

# by a word in a module's class name
_LAYERS = {
    "Mamba": "state-space layers",
    "SSM": "state-space layers",
    "SelectiveScan": "state-space layers",
    "Rwkv": "recurrent layers",
    "RecurrentBlock": "recurrent layers",
    "xLSTM": "recurrent layers",
    "GatedDeltaNet": "linear attention layers",
    "LightningAttention": "linear attention layers",
    "ShortConv": "convolutions over tokens",
    "RelativePositionBias": "relative position biases",
    "Disentangled": "relative position biases",
    "LSHSelfAttention": "hashed attention",
}


def refuse_unknown(model: nn.Module, name: str) -> None:
    """Raises SmeltError that says which construct of the model capture has no words for; returns if it sees none."""
    config: Any = model.config
    found = next(_constructs(model, config), None)
    if found:
        raise SmeltError(f"{name}: cannot be captured, the model has {found}, which smelt does not support yet")


def suspect(model: nn.Module) -> str:
    """The likeliest reason why a graph came out wrong or not at all, as far as transformers tells."""
    if getattr(type(model), "_supports_attention_backend", False):
        return "some construct of this family is not expressed through transformers' attention interface"
    return "the family's attention is its own code, not transformers' attention interface, which capture relies on"


def _constructs(model: nn.Module, config: Any) -> Iterator[str]:
    if getattr(config, "is_encoder_decoder", False):
        yield "an encoder and a decoder (cross attention)"
    if _has_alibi(model, config):
        yield "an ALiBi attention bias"
    for kind in dict.fromkeys(type(module).__name__ for module in model.modules()):
        yield from (what for word, what in _LAYERS.items() if word in kind)
    if any(name.endswith("A_log") for name, _ in model.named_parameters()):
        yield "state-space layers"
    text: Any = config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    for one in (rope, *(v for v in rope.values() if isinstance(v, dict))):
        if one.get("rope_type") in ("dynamic", "longrope"):
            yield f"rotary frequencies that depend on the length of the text (rope_type '{one['rope_type']}')"
    if "chunked_attention" in (getattr(text, "layer_types", None) or ()):
        yield "chunked attention"


def _has_alibi(model: nn.Module, config: Any) -> bool:
    inner = getattr(config, "attn_config", None)
    if getattr(config, "alibi", False) or getattr(inner, "alibi", False):
        return True
    return any(
        hasattr(module, "build_alibi_tensor") or hasattr(module, "build_mpt_alibi_tensor") for module in model.modules()
    )
