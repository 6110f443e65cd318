"""Captures Hugging Face models through transformers' own attention, mask and experts interfaces.

The model is built on the meta device, exported once with dynamic batch and length and no cache, and its weights stay in
their files. What comes out is checked against transformers' eager forward before anyone may use it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from ..errors import SmeltError
from ..program import Program
from ..raising import raise_program
from ..weight import Weight
from .check import check_against_source
from .checkpoint import named
from .exported import strip_prefix, to_program


def capture_hf(source: str | Path | nn.Module) -> Program:
    """A Program of a transformers model given by folder, hub id or object.

    Decoders: inputs tokens and positions int64 [B, T], output logits [B, T, V]. Encoders: inputs tokens and mask
    [B, T], output hidden [B, T, K]. Raises SmeltError naming the construct that cannot be captured.
    """
    _register()
    model, folder = (source, None) if isinstance(source, nn.Module) else _empty_model(Path(source))
    if folder is not None:
        weights = named(model, folder, _shapes(model))
        buffers = {n: Weight.of(b.clone()) for n, b in model.named_buffers() if n not in weights}
    else:
        weights = {n: Weight.of(p) for n, p in _tensors(model).items()}
        buffers = {}
    config: Any = model.config
    decoder = bool(model.can_generate()) and not getattr(config, "is_encoder_decoder", False)
    name = str(config.model_type)
    exported = _export(model, decoder, name)
    program = to_program(
        exported,
        name,
        ("tokens", "positions") if decoder else ("tokens", "mask"),
        ("logits",) if decoder else ("hidden",),
        (weights | buffers).__getitem__,
        _tied(model),
    )
    program.facts = _facts(config, decoder, folder)
    raise_program(program)
    check_against_source(program, model, weights, decoder)
    return program


def _empty_model(folder: Path) -> tuple[Any, Path]:
    """The model of a folder's configuration, parameters on the meta device, computed buffers real."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    if not folder.is_dir():
        folder = _download(str(folder))
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as fault:
        raise SmeltError(f"{folder}: not a transformers model ({str(fault).splitlines()[0]})") from fault
    causal = any("CausalLM" in a or "LMHead" in a for a in config.architectures or [])
    kind = AutoModelForCausalLM if causal else AutoModel
    try:
        with torch.device("meta"):
            model = kind.from_config(config, dtype=torch.float32, attn_implementation="smelt")
    except (ValueError, TypeError, AttributeError) as fault:
        raise SmeltError(f"{config.model_type}: transformers cannot build this model for capture: {fault}") from fault
    model.tie_weights()
    for module in model.modules():  # tables such as inverse frequencies come from the configuration, not from a file
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[key] = torch.empty_like(buffer, device="cpu")
    model.initialize_weights()
    return model.eval(), folder


def _download(identifier: str) -> Path:
    if identifier.startswith((".", "/", "~")) or identifier.count("/") != 1:
        raise SmeltError(f"{identifier}: no such folder (a hub id looks like owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(identifier, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except Exception as fault:  # the hub client raises many kinds; the user needs one
        raise SmeltError(f"{identifier}: no such folder, and the hub did not serve it ({type(fault).__name__})") from fault


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _tied(model: nn.Module) -> dict[str, str]:
    """Names of tied tensors, mapped to the first name of each."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in _tensors(model).items()}


def _shapes(model: Any) -> dict[str, torch.Size]:
    """What must come from the checkpoint: parameters and persistent buffers, each tied group once."""
    persistent, tied = model.state_dict().keys(), _tied(model)
    return {n: t.shape for n, t in _tensors(model).items() if n in persistent and tied[n] == n}


@contextmanager
def _on_meta(model: nn.Module, implementation: str) -> Iterator[None]:
    """The model with every tensor on the meta device and smelt's interfaces chosen; restored on exit."""
    config: Any = model.config
    before = config._attn_implementation, getattr(config, "_experts_implementation", None)
    kept: list[tuple[dict[str, Any], str, Any]] = []
    swapped: dict[int, Any] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is None:
                    continue
                kept.append((table, key, tensor))
                if id(tensor) not in swapped:
                    wide = torch.float32 if tensor.is_floating_point() else tensor.dtype
                    empty = torch.empty_like(tensor, device="meta", dtype=wide)
                    swapped[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
                table[key] = swapped[id(tensor)]
    _choose(model, implementation, implementation)
    try:
        yield
    finally:
        for table, key, tensor in kept:
            table[key] = tensor
        _choose(model, *before)


def _choose(model: Any, attention: str, experts: str | None) -> None:
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            config._attn_implementation = attention
            if getattr(config, "_experts_implementation", None) is not None:
                config._experts_implementation = experts


class _Decoder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=tokens, position_ids=positions, use_cache=False).logits
        return logits


class _Encoder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.model(input_ids=tokens, attention_mask=mask).last_hidden_state
        return hidden


def _export(model: nn.Module, decoder: bool, name: str) -> torch.export.ExportedProgram:
    longest = 1 << 20 if decoder else int(getattr(model.config, "max_position_embeddings", 1 << 20))
    shape = {0: Dim("B", min=1, max=4096), 1: Dim("T", min=1, max=longest)}
    tokens = torch.ones(2, 7, dtype=torch.int64, device="meta")
    wrapped = (_Decoder if decoder else _Encoder)(model)
    with _on_meta(model, "smelt"), torch.no_grad():
        try:
            exported = torch.export.export(
                wrapped, (tokens, tokens.clone()), dynamic_shapes=(shape, dict(shape)), strict=False
            )
        except SmeltError:
            raise
        except Exception as fault:  # export raises dozens of kinds; each means a construct it cannot trace
            first = next((line for line in str(fault).splitlines() if line.strip()), type(fault).__name__)
            raise SmeltError(f"{name}: cannot be captured yet, torch.export stops at: {first.strip()[:300]}") from fault
    strip_prefix(exported)
    return exported


def _facts(config: Any, decoder: bool, folder: Path | None) -> dict[str, Any]:
    text = config.get_text_config(decoder=True) if decoder else config
    eos = getattr(text, "eos_token_id", None)
    context = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    return {
        "kind": "decoder" if decoder else "encoder",
        "family": config.model_type,
        "vocabulary": int(text.vocab_size),
        "context": int(context) if context else None,
        "eos": [] if eos is None else list(eos) if isinstance(eos, list | tuple) else [int(eos)],
        "hidden": int(text.hidden_size),
        "source": folder.name if folder is not None else type(config).__name__,
    }


def _register() -> None:
    """Make `smelt` an attention, mask and experts implementation of transformers (idempotent, by name only)."""
    from transformers import AttentionInterface
    from transformers.integrations.moe import ExpertsInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register("smelt", _attention)
    AttentionMaskInterface.register("smelt", _mask)
    ExpertsInterface.register("smelt", _experts)


_KNOWN = {"dropout", "scaling", "sliding_window", "softcap", "s_aux", "is_causal", "position_ids", "output_attentions"}
_HARMLESS = {"use_cache", "cache_position", "output_hidden_states", "return_dict", "head_mask", "layer_head_mask"}


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [B, H, T, D], key and value [B, G, S, D] → [B, T, H, D]."""
    strange = [k for k, v in options.items() if v is not None and v is not False and k not in _KNOWN | _HARMLESS]
    if strange:
        raise SmeltError(f"{type(module).__name__}: attention argument '{strange[0]}' cannot be captured yet")
    causal = options.get("is_causal")
    causal = bool(getattr(module, "is_causal", True)) if causal is None else bool(causal)
    scaling = options.get("scaling")
    out = torch.ops.smelt.attention(
        query,
        key,
        value,
        attention_mask,
        options.get("s_aux"),
        float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        causal,
        options.get("sliding_window"),
        options.get("softcap"),
    )
    return out.transpose(1, 2).contiguous(), None


def _mask(*_: Any, **options: Any) -> torch.Tensor | None:
    """transformers' mask interface: causality and windows are the op's own; only a padding mask [B, S] is passed on."""
    mask: torch.Tensor | None = options.get("attention_mask")
    return mask


def _experts(
    module: Any, hidden: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor, *_: Any, **__: Any
) -> torch.Tensor:
    """transformers' experts interface for concatenated gate and up weights."""
    act = _ACTIVATION_NAMES.get(getattr(module.config, "hidden_act", ""))
    plain = getattr(module, "is_concatenated", True) and not getattr(module, "is_transposed", False)
    if not plain or getattr(module, "has_bias", False) or not getattr(module, "has_gate", True) or act is None:
        raise SmeltError(f"{type(module).__name__}: experts with this layout cannot be captured yet")
    if getattr(module, "has_post_expert_norm", False) or "_apply_gate" in type(module).__dict__ and not plain:
        raise SmeltError(f"{type(module).__name__}: experts with a norm behind them cannot be captured yet")
    out: torch.Tensor = torch.ops.smelt.experts(hidden, chosen, shares, module.gate_up_proj, module.down_proj, act)
    return out


_ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
