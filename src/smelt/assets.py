"""The files beside the weights that an artefact carries: the tokenizer's, and the model's own configuration."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .ir.errors import SmeltError

CONFIG = "config.json"  # what an export to transformers continues
NAMES = (
    CONFIG,
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
SLOW = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")


@dataclass(frozen=True)
class Assets:
    """Tokenizer files by name, and the folder where they lie (None: the model came without)."""

    folder: Path | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    keep: Any = None  # a temporary folder lives as long as this


def model_assets(model: Any) -> Assets:
    """The tokenizer files of a model folder or hub id, none of a module; transformers converts a slow tokenizer.

    Those of an .onnx file lie beside it, if it has any.
    """
    if not isinstance(model, str | Path):
        return Assets()
    folder = Path(model).parent if Path(model).suffix == ".onnx" else Path(model)
    if not folder.is_dir():
        folder = _hub_folder(str(model))
    if not (folder / "tokenizer.json").is_file() and any((folder / name).is_file() for name in SLOW):
        return _converted(folder)
    return _read(folder)


def _read(folder: Path, keep: Any = None) -> Assets:
    return Assets(folder, {n: (folder / n).read_bytes() for n in NAMES if (folder / n).is_file()}, keep)


def _hub_folder(identifier: str) -> Path:
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(identifier, allow_patterns=["*.json", "*.txt", "*.model", "*.jinja"]))
    except Exception as fault:  # a dozen kinds, of the hub's library and of the network's
        first = next(iter(str(fault).splitlines()), type(fault).__name__)
        raise SmeltError(f"{identifier}: neither a folder nor a model that the hub gives ({first})") from fault


def _converted(folder: Path) -> Assets:
    try:
        from transformers import AutoTokenizer

        keep = tempfile.TemporaryDirectory(prefix="smelt-tokenizer-")
        AutoTokenizer.from_pretrained(folder, local_files_only=True).save_pretrained(keep.name)
        if (folder / CONFIG).is_file():
            shutil.copy(folder / CONFIG, keep.name)
    except Exception as fault:  # transformers raises every kind for a tokenizer that it cannot convert
        first = next(iter(str(fault).splitlines()), type(fault).__name__)
        raise SmeltError(
            f"{folder}: its tokenizer cannot be converted to tokenizer.json ({first}); save a fast one there"
        ) from fault
    return _read(Path(keep.name), keep)
