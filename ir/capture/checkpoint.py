"""The safetensors files of a model folder: every header is read and doubted, no tensor is."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..encoding import Dense
from ..errors import SmeltError
from ..weight import Mapped, Weight

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """Where a checkpoint tensor lies, without reading it."""

    path: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def encoding(self) -> Dense:
        """How the file holds it."""
        return Dense(str(self.dtype).removeprefix("torch."))

    def weight(self) -> Weight:
        """A dense weight that stays in its file."""
        return Weight(self.shape, self.encoding, Mapped({"data": (self.path, self.key)}))

    def read(self) -> torch.Tensor:
        """The mapped tensor."""
        return Mapped({"data": (self.path, self.key)})["data"]


def entries(folder: Path) -> dict[str, Entry]:
    """All tensors of a model folder by checkpoint name; raises on missing shards, pickles and broken headers."""
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.exists() and not whole.exists():
        pickles = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(kind))
        if pickles:
            raise SmeltError(
                f"{folder}: holds the pickle {pickles[0]}, which can run code and is refused; "
                "load it with transformers where you trust it, and save_pretrained the model as safetensors"
            )
        raise SmeltError(f"{folder}: no weights, neither model.safetensors nor model.safetensors.index.json")
    found: dict[str, Entry] = {}
    for path in _shards(index) if index.exists() else [whole]:
        if not path.exists():
            raise SmeltError(f"{path}: this shard is missing ({index.name} names it); download the model again")
        found.update(read_header(path))
    return found


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as fault:
        raise SmeltError(f"{index}: not a safetensors index ({type(fault).__name__}: {fault})") from fault
    for name in names:
        if Path(name).name != name:
            raise SmeltError(f"{index}: the shard '{name}' lies outside the model folder")
    return [index.parent / name for name in names]


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file; every size in the header is checked against the file before use."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise SmeltError(f"{path}: truncated, {size} bytes hold no safetensors header")
        length = struct.unpack("<Q", prefix)[0]
        if length > min(size - 8, 100_000_000):
            raise SmeltError(
                f"{path}: the header claims {length} bytes, the file has {size - 8}; it is truncated or broken"
            )
        try:
            header = json.loads(file.read(length))
        except ValueError as fault:
            raise SmeltError(f"{path}: the header is not JSON ({fault})") from fault
    if not isinstance(header, dict):
        raise SmeltError(f"{path}: the header is not a JSON object")
    body = size - 8 - length
    found = {}
    for key, info in header.items():
        if key == "__metadata__":
            continue
        found[key] = _entry(path, key, info, body)
    try:
        with safe_open(path, framework="pt"):
            pass  # the library has rules of its own, such as no gaps between tensors
    except SafetensorError as fault:
        raise SmeltError(f"{path}: not a sound safetensors file ({fault})") from fault
    return found


def _entry(path: Path, key: str, info: Any, body: int) -> Entry:
    try:
        stored, shape, (start, end) = str(info["dtype"]), tuple(map(int, info["shape"])), map(int, info["data_offsets"])
    except (KeyError, TypeError, ValueError) as fault:
        raise SmeltError(f"{path}: tensor '{key}' has an unreadable header entry ({fault})") from fault
    if stored not in _DTYPES:
        raise SmeltError(f"{path}: tensor '{key}' has the type {stored}; smelt reads {', '.join(_DTYPES)}")
    dtype = _DTYPES[stored]
    if min(shape, default=0) < 0 or end - start != math.prod(shape) * dtype.itemsize:
        raise SmeltError(f"{path}: tensor '{key}' of shape {list(shape)} cannot fill bytes {start} to {end}")
    if start < 0 or end > body:
        raise SmeltError(f"{path}: tensor '{key}' ends at byte {end}, the file holds {body}: truncated")
    return Entry(path, key, dtype, shape)
