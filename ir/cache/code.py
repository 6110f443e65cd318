"""A cache as a bitstream (CacheGen: KV Cache Compression and Streaming, 2023, arXiv:2310.07240): keys and values of a
prompt as small integers, coarser or finer by level, which an entropy coder stores in about the bits they are worth.

Keys are taken before their rotation. Every channel (a dim of a KV head of a layer) loses its mean and is divided by its
spread, both measured once and stored; what is left is rounded to multiples of a step, so that no value is off by more
than half a step of its channel's spread.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from ..errors import SmeltError
from .entropy import Bank, Symbols, fit

RARE = 1e-4  # share of symbols that lie beyond the alphabet and take 32 bits more each
REACH = 120  # an alphabet has at most 2 * REACH + 2 symbols
LEAST = 2.0**-14  # spread of a channel that never changes: the least normal float16


@dataclass(frozen=True)
class Level:
    """Steps of keys and of values in spreads of their channels, for equal parts of the depth from the first layer on.

    CacheGen's own level is (0.5, 1.0, 1.5) for both: later layers bear coarser steps.
    """

    name: str
    keys: tuple[float, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        for role in ("keys", "values"):
            steps = getattr(self, role)
            object.__setattr__(self, role, tuple(map(float, steps if isinstance(steps, Sequence) else (steps,))))
            if not getattr(self, role) or not all(0.001 <= step <= 8 for step in getattr(self, role)):
                raise SmeltError(f"code: level {self.name}: {role} are steps of 0.001 to 8 spreads, not {steps!r}")
        if not self.name.isidentifier() or self.name in ("lossless", "text"):
            raise SmeltError(f"code: a level cannot be called '{self.name}'")

    def step(self, role: str, layer: int, layers: int) -> float:
        """The step of a role in layer `layer` of `layers`."""
        steps: tuple[float, ...] = self.keys if role == "keys" else self.values
        return steps[layer * len(steps) // layers]


LEVELS = (
    Level("high", (0.25,), (0.5,)),
    Level("medium", (0.5,), (1.0,)),
    Level("low", (0.75, 1.0, 1.25), (1.25, 1.5, 1.75)),
)


@dataclass(frozen=True)
class Code:
    """How a prompt's cache is written as a bitstream.

    levels: finest first. chunk: tokens that are sent, and can be read, at once. sink: first tokens, kept as float16.
    delta: `none` rounds every token for itself; `anchor` takes the first of `group` tokens as an anchor and rounds the
    others' differences to it as it was rounded (the paper's form); `fitted` scales the anchor by what each channel
    keeps of it over a group. tables: most frequency tables for keys, and for values, of a level.
    """

    levels: tuple[Level, ...] = LEVELS
    chunk: int = 256
    sink: int = 4
    delta: Literal["none", "anchor", "fitted"] = "none"
    group: int = 10
    tables: int = 8

    def __post_init__(self) -> None:
        levels = tuple(Level(**level) if isinstance(level, Mapping) else level for level in self.levels)
        object.__setattr__(self, "levels", levels)
        for fault in self._faults():
            raise SmeltError(f"code: {fault}")

    def _faults(self) -> Iterator[str]:
        names = [level.name for level in self.levels]
        if not names or len(set(names)) < len(names):
            yield f"levels need names of their own, not {names}"
        if self.chunk < 1 or self.sink < 0:
            yield f"a chunk of {self.chunk} and a sink of {self.sink} tokens cannot be"
        if self.delta not in ("none", "anchor", "fitted"):
            yield f"unknown delta '{self.delta}'; known: none, anchor, fitted"
        if not 2 <= self.group <= self.chunk:
            yield f"a group counts 2 tokens to a chunk of {self.chunk}, not {self.group}"
        if not 1 <= self.tables <= 256:
            yield f"tables counts 1 to 256, not {self.tables}"

    def level(self, name: str) -> Level:
        """The level of this name."""
        for level in self.levels:
            if level.name == name:
                return level
        raise SmeltError(f"code: no level '{name}'; there are {', '.join(level.name for level in self.levels)}")

    def chunks(self, tokens: int) -> list[slice]:
        """The chunks of so many tokens; sinks are in none."""
        return [slice(i, min(i + self.chunk, tokens)) for i in range(min(self.sink, tokens), tokens, self.chunk)]

    def rows(self, tokens: int, channels: int) -> list[int]:
        """How many symbols each row of a chunk of so many tokens has: all channels', with deltas first the anchors'."""
        if self.delta == "none":
            return [tokens] * channels
        anchors = -(-tokens // self.group)
        return [anchors] * channels + [tokens - anchors] * channels


@dataclass(frozen=True)
class Scales:
    """What channels [C] are centred and divided by, and the part of an anchor that they keep; float16, as stored."""

    mean: torch.Tensor
    spread: torch.Tensor
    gain: torch.Tensor

    @classmethod
    def measure(cls, x: torch.Tensor, code: Code) -> Scales:
        """The scales of x [T, C]."""
        x = x.float()
        if not bool(x.isfinite().all()):
            raise SmeltError("code: the cache holds NaN or infinite values, which no step can round")
        mean = x.mean(0) if len(x) else x.new_zeros(x.shape[1])
        spread = (x - mean).square().mean(0).sqrt() if len(x) else torch.ones_like(mean)
        gain = torch.ones_like(mean) if code.delta == "anchor" else torch.zeros_like(mean)
        whole = len(x) // code.group * code.group
        if code.delta == "fitted" and whole:
            groups = (x[:whole] - mean).unflatten(0, (-1, code.group))
            kept = (groups[:, 1:] * groups[:, :1]).mean((0, 1))
            gain = (kept / groups[:, 0].square().mean(0).clamp_min(LEAST**2)).clamp(0, 1)
        stored = mean.half(), spread.half().clamp_min(LEAST), gain.half()
        if not all(bool(part.isfinite().all()) for part in stored):
            raise SmeltError(
                "code: a channel's mean or spread overflows float16; export this cache with level lossless"
            )
        return cls(*stored)


def rounded(x: torch.Tensor, scales: Scales, step: torch.Tensor, code: Code) -> list[Symbols]:
    """The rows (see `Code.rows`) of a chunk x [T, C] in steps [C] of the spread; differences to the anchor as read."""
    unit = scales.spread.float() * step
    centred = x.float() - scales.mean.float()
    if code.delta == "none":
        return _rows(torch.round(centred / unit))
    anchors = torch.round(centred[:: code.group] / unit)
    against = (anchors * unit * scales.gain.float()).repeat_interleave(code.group, 0)[: len(x)]
    rest = torch.round((centred - against) / unit)[_rest(len(x), code)]
    return _rows(anchors) + _rows(rest)


def restored(rows: Sequence[Symbols], scales: Scales, step: torch.Tensor, code: Code) -> torch.Tensor:
    """Inverse of `rounded` up to half a step: x [T, C] in float32."""
    unit, channels = scales.spread.float() * step, len(scales.mean)
    first = torch.from_numpy(np.stack(rows[:channels])).T * unit
    if code.delta == "none":
        return first + scales.mean.float()
    rest = torch.from_numpy(np.stack(rows[channels:])).T * unit
    tokens = len(first) + len(rest)
    out = (first * scales.gain.float()).repeat_interleave(code.group, 0)[:tokens]
    out[:: code.group] = first
    out[_rest(tokens, code)] += rest
    return out + scales.mean.float()


def _rest(tokens: int, code: Code) -> torch.Tensor:
    """bool [T]: which tokens are no anchors."""
    return torch.arange(tokens) % code.group != 0


def _rows(symbols: torch.Tensor) -> list[Symbols]:
    if symbols.numel() and float(symbols.abs().max()) >= 2**31:
        raise SmeltError("code: a value lies 2^31 steps off its channel's mean; use level lossless")
    return list(np.ascontiguousarray(symbols.T.to(torch.int32).numpy()))


def profile(chunks: Sequence[Sequence[Symbols]], most: int) -> Bank:
    """Tables for the rows of these chunks; symbols beyond an alphabet that holds all but the rarest are escaped."""
    rows = [np.concatenate(pieces) for pieces in zip(*chunks, strict=True)]
    every = np.abs(np.concatenate(rows)) if rows else np.empty(0, np.int32)
    reach = int(np.quantile(every, 1 - RARE, method="higher")) if every.size else 1
    reach = min(max(reach, 1), REACH)
    counts = [np.bincount(_folded(row, reach), minlength=2 * reach + 2) for row in rows]
    return fit(np.stack(counts).astype(np.int64), most)


def pack(rows: Sequence[Symbols], bank: Bank) -> bytes:
    """The symbols of a chunk: how many are escaped (uint32), these (int32 each), and the entropy coder's stream."""
    reach = _reach(bank)
    beyond = [row[np.abs(row) > reach] for row in rows]
    escaped = np.concatenate(beyond).astype("<i4") if beyond else np.empty(0, "<i4")
    return struct.pack("<I", len(escaped)) + escaped.tobytes() + bank.encode([_folded(row, reach) for row in rows])


def unpack(data: bytes, bank: Bank, sizes: Sequence[int]) -> list[Symbols]:
    """Inverse of `pack` for rows of these sizes."""
    count = struct.unpack_from("<I", data)[0] if len(data) >= 4 else 1
    if 4 + 4 * count > len(data):
        raise SmeltError("code: a chunk is cut")
    escaped, reach = np.frombuffer(data, "<i4", count, 4), _reach(bank)
    rows, used = [row - reach for row in bank.decode(data[4 + 4 * count :], sizes)], 0
    for row in rows:
        at = np.flatnonzero(row > reach)
        row[at] = escaped[used : used + len(at)]
        used += len(at)
    if used != count:
        raise SmeltError("code: a chunk has not the symbols that it announces")
    return rows


def _reach(bank: Bank) -> int:
    return int(bank.weights.shape[1]) // 2 - 1


def _folded(row: Symbols, reach: int) -> Symbols:
    """Symbols from 0 on; what lies beyond the alphabet is its last one."""
    return np.where(np.abs(row) <= reach, row + reach, 2 * reach + 1).astype(np.int32)


def steps(level: Level, role: str, layers: Sequence[int]) -> torch.Tensor:
    """The step of every channel of layers that have so many channels each, [C]."""
    sizes: Any = torch.tensor(list(layers))
    return torch.tensor([level.step(role, i, len(layers)) for i in range(len(layers))]).repeat_interleave(sizes)
