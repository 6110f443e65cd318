"""What the files beside a model.onnx say of it: how long a text it reads, which tokens end one, what it is called."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import SmeltError

_LONGEST = 1 << 40  # a context from here on is no number that somebody meant


@dataclass(frozen=True)
class Beside:
    """None and () where nothing is told."""

    context: int | None = None
    eos: tuple[int, ...] = ()
    family: str | None = None


# file: the keys of what holds the rest, of the context, the ends and the family
_FILES: dict[str, tuple[str | None, tuple[str, ...], str, str]] = {
    "smelt.json": (None, ("context",), "eos", "family"),
    "genai_config.json": ("model", ("context_length",), "eos_token_id", "type"),
    "config.json": (None, ("max_position_embeddings", "n_positions"), "eos_token_id", "model_type"),
}


def beside(folder: Path) -> Beside:
    """From the first of smelt.json, genai_config.json and config.json; raises SmeltError naming the file and key."""
    for name, (holder, contexts, ends, family) in _FILES.items():
        path = folder / name
        if not path.is_file():
            continue
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as fault:
            raise SmeltError(f"{path}: cannot be read as JSON ({fault})") from fault
        told = read.get(holder) if holder is not None and isinstance(read, dict) else read
        if not isinstance(told, dict):
            raise SmeltError(f"{path}: {f'{holder!r} in it ' if holder else ''}is no object of names and values")
        key = next((key for key in contexts if told.get(key)), contexts[0])
        return Beside(_whole(path, told, key), _ends(path, told, ends), _name(told, family))
    return Beside()


def _whole(path: Path, told: Mapping[str, Any], key: str) -> int | None:
    value = told.get(key)
    if value is None:
        return None
    if type(value) is not int or not 0 < value < _LONGEST:
        raise SmeltError(f"{path}: '{key}' is {value!r}; a number of tokens is wanted")
    return value


def _ends(path: Path, told: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = told.get(key)
    ends = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(end) is not int or end < 0 for end in ends):
        raise SmeltError(f"{path}: '{key}' is {value!r}; a token id or a list of them is wanted")
    return tuple(ends)


def _name(told: Mapping[str, Any], key: str) -> str | None:
    return told[key] if isinstance(told.get(key), str) else None
