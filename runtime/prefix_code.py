"""A prefix's dense keys and values as levels of coded chunks, and back (CacheGen, 2023; see `ir/cache/code.py`).

Channels of all layers stand side by side: keys [T, C] with C = Σ G · D, and values likewise. What all chunks share
(scales, tables) is written once, the sinks as they are, and every chunk at every level as a block of its own.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from ..ir.cache import CachePlan
from ..ir.cache.code import Code, Scales, pack, profile, restored, rounded, steps, unpack
from ..ir.cache.entropy import Bank
from ..ir.cache.saved import Saved
from ..ir.errors import SmeltError

ROLES = ("keys", "values")
TAIL = {"keys": "tail_k", "values": "tail_v"}


def encode(saved: Saved, plan: CachePlan, code: Code, names: Sequence[str]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Facts and blocks of an open row at levels of these names."""
    flat = {role: _flat(saved, plan, role) for role in ROLES}
    chunks = code.chunks(saved.length)
    sink = min(code.sink, saved.length)
    scales = {role: Scales.measure(flat[role][sink:], code) for role in ROLES}
    blocks = {"sinks": b"".join(_bytes(part[:, :sink]) for part in _parts(saved, plan))}
    blocks["scales"] = b"".join(_bytes(part) for role in ROLES for part in _held(scales[role], code))
    tables: dict[str, Any] = {}
    for name in names:
        level, shapes, streams = code.level(name), {}, []
        for role in ROLES:
            every = steps(level, role, _channels(plan, role))
            rows = [rounded(flat[role][chunk], scales[role], every, code) for chunk in chunks]
            bank = profile(rows, code.tables) if rows else None
            streams.append([pack(r, bank) for r in rows] if bank else [])
            shapes[role] = list(bank.weights.shape) if bank else [0, 0]
            blocks[f"{name}.{role}"] = bank.weights.astype("<u2").tobytes() + bank.of.tobytes() if bank else b""
        tables[name] = shapes
        for number, (keys, values) in enumerate(zip(*streams, strict=True)):
            blocks[f"{name}.{number}"] = struct.pack("<I", len(keys)) + keys + values
    return {"code": asdict(code), "tables": tables}, blocks


class Decoder:
    """Reads sinks and chunks of a coded prefix from its blocks, each at the level that is asked for."""

    def __init__(self, facts: Mapping[str, Any], read: Any, plan: CachePlan, length: int) -> None:
        """`read(name)` gives a block; `length`: tokens of the prefix."""
        self.code = Code(**facts["code"])
        self.plan, self.length, self._read = plan, length, read
        self.levels = [level.name for level in self.code.levels if level.name in facts["tables"]]
        if not self.levels:
            raise SmeltError("it has no level")
        self._shapes = facts["tables"]
        self.chunks = self.code.chunks(length)
        self._scales = dict(zip(ROLES, self._scales_of(read("scales")), strict=True))
        self._banks: dict[tuple[str, str], Bank] = {}

    def sinks(self) -> Saved:
        """The first tokens, bit for bit."""
        data, at, parts = self._read("sinks"), 0, {}
        sink = min(self.code.sink, self.length)
        for site in self.plan.sites:
            dtype: torch.dtype = getattr(torch, site.dense)
            for role, dim in (("keys", site.key_dim), ("values", site.value_dim)):
                size = site.kv_heads * sink * dim * dtype.itemsize
                if at + size > len(data):
                    raise SmeltError("its sinks are cut")
                raw = torch.tensor(bytearray(data[at : at + size]), dtype=torch.uint8).view(dtype)
                parts[f"{site.layer}.{TAIL[role]}"] = raw.reshape(site.kv_heads, sink, dim)
                at += size
        return self._saved(parts, sink)

    def chunk(self, number: int, name: str) -> Saved:
        """The tokens of a chunk as they are at a level, at their positions."""
        chunk, data = self.chunks[number], self._read(f"{name}.{number}")
        first = struct.unpack_from("<I", data)[0] if len(data) >= 4 else 0
        parts: dict[str, torch.Tensor] = {}
        for role, stream in zip(ROLES, (data[4 : 4 + first], data[4 + first :]), strict=True):
            channels = _channels(self.plan, role)
            bank, tokens = self._bank(name, role), chunk.stop - chunk.start
            rows = unpack(stream, bank, self.code.rows(tokens, sum(channels)))
            x = restored(rows, self._scales[role], steps(self.code.level(name), role, channels), self.code)
            for site, part in zip(self.plan.sites, x.split(channels, 1), strict=True):
                value = part.unflatten(1, (site.kv_heads, -1)).transpose(0, 1)
                if role == "keys" and site.rope is not None:
                    value = site.rope.turn(value, torch.arange(chunk.start, chunk.stop))
                parts[f"{site.layer}.{TAIL[role]}"] = value.to(getattr(torch, site.dense))
        return self._saved(parts, chunk.stop - chunk.start)

    def _saved(self, parts: dict[str, torch.Tensor], length: int) -> Saved:
        """An open piece, its parts in the order of layers."""
        ordered: dict[str, torch.Tensor] = {}
        for site in self.plan.sites:
            ordered |= {f"{site.layer}.{tail}": parts[f"{site.layer}.{tail}"] for tail in TAIL.values()}
            ordered[f"{site.layer}.counted"] = torch.tensor(0)
        return Saved(length, 0, True, ordered)

    def _scales_of(self, data: bytes) -> Iterator[Scales]:
        channels = [sum(_channels(self.plan, role)) for role in ROLES]
        kinds = 3 if self.code.delta == "fitted" else 2
        if len(data) != 2 * kinds * sum(channels):
            raise SmeltError("its scales are not those of the model's channels")
        numbers = torch.frombuffer(bytearray(data), dtype=torch.float16)
        for count, part in zip(channels, numbers.split([kinds * c for c in channels]), strict=True):
            mean, spread, *gain = part.split(count)
            fixed = torch.full_like(mean, float(self.code.delta == "anchor"))
            yield Scales(mean, spread, gain[0] if gain else fixed)

    def _bank(self, name: str, role: str) -> Bank:
        if (name, role) not in self._banks:
            tables, symbols = map(int, self._shapes[name][role])
            rows, data = len(self.code.rows(0, sum(_channels(self.plan, role)))), self._read(f"{name}.{role}")
            if tables < 1 or symbols < 4 or len(data) != 2 * tables * symbols + rows:
                raise SmeltError(f"its tables of {role} at level {name} are not those of the model's channels")
            weights = np.frombuffer(data, "<u2", tables * symbols).reshape(tables, symbols).astype(np.uint16)
            self._banks[name, role] = Bank(weights, np.frombuffer(data, np.uint8, rows, 2 * tables * symbols))
        return self._banks[name, role]


def _held(scales: Scales, code: Code) -> tuple[torch.Tensor, ...]:
    """The scales that a file needs: a gain is stored only where it was fitted."""
    return (scales.mean, scales.spread, *((scales.gain,) if code.delta == "fitted" else ()))


def _channels(plan: CachePlan, role: str) -> list[int]:
    """Channels of each layer."""
    return [site.kv_heads * (site.key_dim if role == "keys" else site.value_dim) for site in plan.sites]


def _flat(saved: Saved, plan: CachePlan, role: str) -> torch.Tensor:
    """Keys as they were before their rotation, or values, of all layers: [T, C] in float32."""
    out = []
    for site in plan.sites:
        x = saved.parts[f"{site.layer}.{TAIL[role]}"].float()
        if role == "keys" and site.rope is not None:
            x = site.rope.turn(x, -torch.arange(saved.length))
        out.append(x.transpose(0, 1).flatten(1))
    return torch.cat(out, 1)


def _parts(saved: Saved, plan: CachePlan) -> Iterator[torch.Tensor]:
    for site in plan.sites:
        yield from (saved.parts[f"{site.layer}.{TAIL[role]}"] for role in ROLES)


def _bytes(x: torch.Tensor) -> bytes:
    data: bytes = x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return data
