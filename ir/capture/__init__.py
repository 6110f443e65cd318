"""Capture: torch modules, Hugging Face models with their checkpoints, and ONNX files become Programs."""

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
    """A Program of a model folder, a hub id, an .onnx file or its folder, a transformers model or a plain torch module.

    `example`: positional inputs that a plain module is traced with. Raises SmeltError naming what cannot be captured.
    """
    if isinstance(model, nn.Module) and not hasattr(model, "config"):
        return capture_module(model, example or ())
    if not isinstance(model, nn.Module | str | Path):
        raise SmeltError(f"capture takes a folder, a hub id or a torch module, not a {type(model).__name__}")
    if not isinstance(model, nn.Module):
        if is_onnx(Path(model)):
            return _capture_onnx(Path(model))
        _refuse_file(Path(model))
    try:
        from .hf import capture_hf
    except ImportError as fault:
        raise SmeltError("capturing a transformers model needs transformers: pip install 'smelt[hf]'") from fault
    return capture_hf(model)


def is_onnx(path: Path) -> bool:
    """Whether this is an .onnx file, or a folder that holds model.onnx and no transformers model."""
    if path.is_dir():
        transformers = (path / "config.json").is_file() and any(path.glob("*.safetensors"))
        return (path / "model.onnx").is_file() and not transformers
    return path.suffix == ".onnx"


def _capture_onnx(path: Path) -> Program:
    try:
        from .onnx import capture_onnx
    except ImportError as fault:
        raise SmeltError("capturing an ONNX model needs onnx: pip install 'smelt[onnx]'") from fault
    return capture_onnx(path)


def _refuse_file(path: Path) -> None:
    if path.suffix in _PICKLES:
        raise SmeltError(f"{path}: a pickle can run code and is refused; give the model's folder with safetensors")
    if path.is_file():
        raise SmeltError(
            f"{path}: is a file; give the model's folder, with config.json beside the weights, or an .onnx"
        )


__all__ = ["capture", "capture_module", "is_onnx"]
