"""Weights of a model folder, read lazily: safetensors are mapped, converted names and merges computed on demand."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..encoding import Dense
from ..errors import SmeltError, nearest
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

    def weight(self) -> Weight:
        """A dense weight that stays in its file."""
        return Weight(self.shape, Dense(_name(self.dtype)), Mapped({"data": (self.path, self.key)}))

    def read(self) -> torch.Tensor:
        """The mapped tensor."""
        return Mapped({"data": (self.path, self.key)})["data"]


@dataclass(frozen=True)
class Computed(Mapping[str, torch.Tensor]):
    """Parts that a conversion computes anew on each access, so that nothing stays resident."""

    compute: Callable[[], torch.Tensor]

    def __getitem__(self, part: str) -> torch.Tensor:
        if part != "data":
            raise KeyError(part)
        return self.compute()

    def __iter__(self) -> Iterator[str]:
        return iter(("data",))

    def __len__(self) -> int:
        return 1


def entries(folder: Path) -> dict[str, Entry]:
    """All tensors of a model folder by checkpoint name; raises on missing shards, pickles and broken headers."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as fault:
            raise SmeltError(f"{index}: not a safetensors index ({fault})") from fault
    elif (folder / "model.safetensors").exists():
        shards = ["model.safetensors"]
    else:
        pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
        if pickles:
            raise SmeltError(
                f"{folder}: holds the pickle {pickles[0]}, which can run code and is refused; "
                "convert it with `save_pretrained(..., safe_serialization=True)`"
            )
        raise SmeltError(f"{folder}: no model.safetensors and no model.safetensors.index.json")
    found: dict[str, Entry] = {}
    for shard in shards:
        path = folder / shard
        if path.resolve().parent != folder.resolve() and not path.is_symlink():
            raise SmeltError(f"{index}: the shard {shard!r} lies outside the model folder")
        if not path.exists():
            raise SmeltError(f"{path}: shard is missing (named by {index.name}); download the model again")
        found.update(read_header(path))
    return found


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file; every size in the header is checked against the file before use."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise SmeltError(f"{path}: truncated, {size} bytes hold no safetensors header")
        length = struct.unpack("<Q", prefix)[0]
        if length > min(size - 8, 100_000_000):
            raise SmeltError(f"{path}: the header claims {length} bytes, the file has {size - 8}; it is truncated or broken")
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
    return found


def _entry(path: Path, key: str, info: Any, body: int) -> Entry:
    try:
        dtype, shape, (start, end) = _DTYPES[info["dtype"]], tuple(map(int, info["shape"])), info["data_offsets"]
    except (KeyError, TypeError, ValueError) as fault:
        raise SmeltError(f"{path}: tensor '{key}' has an unreadable header entry ({fault})") from fault
    count = 1
    for dim in shape:
        count *= dim
    if min(shape, default=0) < 0 or end - start != count * dtype.itemsize:
        raise SmeltError(f"{path}: tensor '{key}' of shape {shape} cannot fill bytes {start} to {end}")
    if start < 0 or end > body:
        raise SmeltError(f"{path}: tensor '{key}' ends at byte {end}, the file holds {body}: truncated")
    return Entry(path, key, dtype, shape)


def named(model: Any, folder: Path, wanted: Mapping[str, torch.Size]) -> dict[str, Weight]:
    """Weights by the names of `model`'s own state dict, converted as transformers converts while loading.

    `wanted` maps each name to the shape that the model expects.
    """
    raw = entries(folder)
    found = _converted(model, raw, wanted)
    for name, shape in wanted.items():
        if name not in found:
            raise SmeltError(f"{folder}: the checkpoint has no tensor for '{name}'{nearest(name, raw)}")
        if found[name].shape != tuple(shape):
            raise SmeltError(f"{folder}: '{name}' has shape {found[name].shape}, the configuration asks for {tuple(shape)}")
    return found


def _converted(model: Any, raw: dict[str, Entry], wanted: Mapping[str, torch.Size]) -> dict[str, Weight]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model) or []
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    meta = model.state_dict()
    found: dict[str, Weight] = {}
    merged: dict[str, tuple[Any, list[tuple[str, str, Entry]]]] = {}
    for key in sorted(raw, key=_natural):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, meta)
        if pattern is None:
            found[name] = raw[key].weight()
        else:
            merged.setdefault(name, (by_pattern[pattern], []))[1].append((key, pattern, raw[key]))
    for name, (converter, sources) in merged.items():
        for target in [n for n in wanted if n == name] or _targets(name, converter, model, sources):
            found[target] = _merge(name, target, converter, model, sources, wanted)
    return found


def _targets(name: str, converter: Any, model: Any, sources: list[tuple[str, str, Entry]]) -> list[str]:
    """The names that one conversion yields, found by running it on the spot."""
    return list(_run(name, converter, model, sources))


def _merge(
    name: str, target: str, converter: Any, model: Any, sources: list[tuple[str, str, Entry]], wanted: Mapping[str, torch.Size]
) -> Weight:
    def compute() -> torch.Tensor:
        value = _run(name, converter, model, sources)[target]
        return value[0] if isinstance(value, list) else value

    shape = tuple(wanted[target]) if target in wanted else tuple(compute().shape)
    return Weight(shape, Dense(_name(sources[0][2].dtype)), Computed(compute))


def _run(name: str, converter: Any, model: Any, sources: list[tuple[str, str, Entry]]) -> dict[str, Any]:
    fresh = deepcopy(converter)
    for key, pattern, entry in sources:
        fresh.add_tensor(name, key, pattern, entry.read)
    result: dict[str, Any] = fresh.convert(name, model=model, config=model.config)
    return result


def _natural(key: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in key.split(".")]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
