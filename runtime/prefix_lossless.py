"""Tensors of a saved cache as entropy-coded bytes, bit for bit: whatever a recipe stores can leave and come back.

A tensor is taken apart into planes, the first bytes of all its elements, then the second ones, …: exponents and codes
are uneven, the low bytes of numbers are noise. A plane that has nothing to gain is kept as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..ir.cache.entropy import Bank, Symbols, fit
from ..ir.errors import SmeltError

TABLES = 16  # of 512 bytes each, shared by the planes of all layers
GAIN = 0.98  # a plane whose entropy is above this part of 8 bits is kept raw
DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8")

Planes = list[npt.NDArray[np.uint8]]


def pack(parts: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Facts and blocks: one block for each layer, the first word of the parts' names, and one of tables."""
    for name, part in parts.items():
        if str(part.dtype).removeprefix("torch.") not in DTYPES:
            raise SmeltError(f"part '{name}' is {part.dtype}, which no file of a prefix holds")
    planes = {name: _planes(part) for name, part in parts.items()}
    counts = [np.bincount(plane, minlength=256) for found in planes.values() for plane in found]
    coded = [_entropy(count) < 8 * GAIN for count in counts]
    table = fit(np.stack([c for c, yes in zip(counts, coded, strict=True) if yes]), TABLES) if any(coded) else None
    listed: list[Any] = []
    blocks: dict[str, bytes] = {"lossless.tables": b"" if table is None else table.weights.astype("<u2").tobytes()}
    blocks["lossless.rows"] = b"" if table is None else table.of.tobytes()
    flags, used = iter(coded), 0
    layers: dict[str, list[str]] = {}
    for name in parts:
        layers.setdefault(name.split(".")[0], []).append(name)
    if [name for names in layers.values() for name in names] != list(parts):
        raise SmeltError("lossless: the parts of a layer must follow each other")
    for layer, names in layers.items():
        raw: Planes = []
        rows: Planes = []
        for name in names:
            kept = [next(flags) for _ in planes[name]]
            for plane, yes in zip(planes[name], kept, strict=True):
                (rows if yes else raw).append(plane)
            part = parts[name]
            listed.append([name, str(part.dtype).removeprefix("torch."), list(part.shape), [int(yes) for yes in kept]])
        stream = b""
        if rows and table is not None:
            own = Bank(table.weights, table.of[used : used + len(rows)])
            stream = own.encode([row.astype(np.int32) for row in rows])
            used += len(rows)
        blocks[f"lossless.{layer}"] = b"".join(plane.tobytes() for plane in raw) + stream
    return {"parts": listed}, blocks


def unpack(facts: Mapping[str, Any], read: Any, most: int) -> dict[str, torch.Tensor]:
    """Inverse of `pack`; `read(name)` gives a block. Raises SmeltError if the parts were to take over `most` bytes."""
    listed = [_entry(entry) for entry in facts["parts"]]
    if sum(len(kept) * math.prod(shape) for _, _, shape, kept in listed) > most:
        raise SmeltError(f"its parts would take more than the {most} bytes that such a prefix can have")
    weights, of = np.frombuffer(read("lossless.tables"), "<u2"), np.frombuffer(read("lossless.rows"), np.uint8)
    if len(of) != sum(sum(kept) for *_, kept in listed) or len(weights) % 256:
        raise SmeltError("its tables are not those of its parts")
    layers: dict[str, list[tuple[str, torch.dtype, list[int], list[int]]]] = {}
    for entry in listed:
        layers.setdefault(entry[0].split(".")[0], []).append(entry)
    out, used = {}, 0
    for layer, entries in layers.items():
        data, sizes = read(f"lossless.{layer}"), [math.prod(s) for _, _, s, kept in entries for yes in kept if yes]
        raw = sum(math.prod(shape) * (len(kept) - sum(kept)) for _, _, shape, kept in entries)
        if raw > len(data):
            raise SmeltError(f"its block of layer {layer} is too short")
        coded: Iterator[Symbols] = iter(())
        if sizes:
            bank = Bank(weights.reshape(-1, 256).astype(np.uint16), of[used : used + len(sizes)])
            coded = iter(bank.decode(data[raw:], sizes))
            used += len(sizes)
        at = 0
        for name, dtype, shape, kept in entries:
            size, planes = math.prod(shape), []
            for yes in kept:
                if yes:
                    planes.append(np.asarray(next(coded), np.uint8))
                    continue
                planes.append(np.frombuffer(data, np.uint8, size, at))
                at += size
            out[name] = _joined(planes, dtype, shape)
    return out


def _planes(part: torch.Tensor) -> Planes:
    """The bytes of a tensor's elements, by their place in the element."""
    data = part.reshape(-1).contiguous().view(torch.uint8).numpy().reshape(-1, part.element_size())
    return [np.ascontiguousarray(data[:, i]) for i in range(part.element_size())]


def _joined(planes: Planes, dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.stack(planes, 1).reshape(-1)).view(dtype).reshape(shape)


def _entropy(count: npt.NDArray[np.int64]) -> float:
    """Bits per byte, with what a choice of table costs; a plane of few bytes is not worth one."""
    total = int(count.sum())
    if total < 64:
        return 8.0
    shares = count[count > 0] / total
    return float(-(shares * np.log2(shares)).sum())


def _entry(entry: Any) -> tuple[str, torch.dtype, list[int], list[int]]:
    """One line of the header's list of parts, checked."""
    name, dtype, shape, kept = entry
    if dtype not in DTYPES or not all(type(n) is int and 0 <= n < 1 << 40 for n in shape):
        raise SmeltError(f"its part '{name}' is of type {dtype} and shape {shape}")
    kind: torch.dtype = getattr(torch, dtype)
    if len(kept) != kind.itemsize or not set(kept) <= {0, 1}:
        raise SmeltError(f"its part '{name}' has {len(kept)} planes, {dtype} has {kind.itemsize}")
    return str(name), kind, list(shape), list(kept)
