"""Model folders: the configuration is read and doubted, and the model is built on the meta device."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import SmeltError, nearest
from .exported import first_line


def empty_model(source: Path) -> tuple[nn.Module, Path]:
    """The model of a folder or hub id: parameters on the meta device, tables that the configuration gives are real."""
    from transformers import AutoModel, AutoModelForCausalLM

    folder = source if source.is_dir() else _download(str(source))
    config = _config(folder)
    kind: Any = AutoModelForCausalLM if _is_causal(config) else AutoModel
    try:
        with torch.device("meta"):
            model = kind.from_config(config, dtype=torch.float32, attn_implementation="eager")
    except Exception as fault:  # modelling code raises anything when a number in the configuration is wrong
        raise SmeltError(
            f"{folder / 'config.json'}: transformers cannot build a {config.model_type} model: {first_line(fault)}"
        ) from fault
    model.tie_weights()
    _compute_buffers(model)
    return model.eval(), folder


def _config(folder: Path) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    path = folder / "config.json"
    if not path.is_file():
        raise SmeltError(f"{folder}: not a model folder, it has no config.json")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as fault:
        raise SmeltError(f"{path}: cannot be read as JSON ({fault})") from fault
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(kind, str):
        raise SmeltError(f"{path}: has no model_type; is it the configuration of a transformers model?")
    if kind not in CONFIG_MAPPING:
        if raw.get("auto_map"):
            raise SmeltError(
                f"{path}: model_type '{kind}' needs Python code from the model's folder (trust_remote_code), which "
                "smelt never runs; convert the model to a family that transformers has"
            )
        hint = nearest(kind, CONFIG_MAPPING.keys())
        raise SmeltError(f"{path}: transformers has no model_type '{kind}'{hint}; a newer transformers may have it")
    if raw.get("quantization_config"):
        method = dict(raw["quantization_config"]).get("quant_method", "unknown")
        raise SmeltError(f"{path}: the weights are quantized already (by {method}); give the original model")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as fault:  # each family validates its configuration in its own way
        raise SmeltError(f"{path}: not a valid configuration of {kind}: {first_line(fault)}") from fault


def _is_causal(config: Any) -> bool:
    names = config.architectures or []
    if config.is_encoder_decoder or not names:
        return False
    return any("CausalLM" in name or "LMHead" in name or "ForConditionalGeneration" in name for name in names)


def _compute_buffers(model: Any) -> None:
    """Tables such as inverse frequencies come from the configuration, not from a file; transformers fills them in.

    What it forgets stays NaN or negative, so that nothing works by accident.
    """
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                unset = math.nan if buffer.is_floating_point() else 0 if buffer.dtype == torch.bool else -1
                module._buffers[key] = torch.full_like(buffer, unset, device="cpu")
    model.initialize_weights()


def _download(identifier: str) -> Path:
    if identifier.startswith((".", "/", "~")) or identifier.count("/") != 1:
        raise SmeltError(f"{identifier}: no such folder (a hub id looks like owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(identifier, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except Exception as fault:  # the hub client raises many kinds; the user needs one
        raise SmeltError(
            f"{identifier}: no such folder, and the hub did not serve it ({type(fault).__name__})"
        ) from fault
