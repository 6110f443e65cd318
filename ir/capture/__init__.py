"""Capture: torch modules, Hugging Face models and their checkpoints become Programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ..errors import SmeltError
from ..program import Program
from .module import capture_module

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def capture(model: str | Path | nn.Module, example: Sequence[torch.Tensor] | None = None) -> Program:
    """A Program of a model folder, a hub id, a transformers model or a plain torch module.

    `example`: positional inputs that a plain module is traced with. Raises SmeltError naming what cannot be captured.
    """
    if isinstance(model, nn.Module) and not hasattr(model, "config"):
        return capture_module(model, example or ())
    if not isinstance(model, nn.Module | str | Path):
        raise SmeltError(f"capture takes a folder, a hub id or a torch module, not a {type(model).__name__}")
    if not isinstance(model, nn.Module):
        _refuse_file(Path(model))
    try:
        from .hf import capture_hf
    except ImportError as fault:
        raise SmeltError("capturing a transformers model needs transformers: pip install 'smelt[hf]'") from fault
    return capture_hf(model)


def _refuse_file(path: Path) -> None:
    if path.suffix in _PICKLES:
        raise SmeltError(f"{path}: a pickle can run code and is refused; give the model's folder with safetensors")
    if path.is_file():
        raise SmeltError(f"{path}: is a file; give the model's folder, with config.json beside the weights")


__all__ = ["capture", "capture_module"]
