"""Entropy coding of small integers: a bank of frequency tables that rows share, and one ANS stream of all rows.

A table per row (CacheGen has one per layer and channel) costs as much as it saves on contexts of some hundred tokens.
So rows with like histograms share a table of the bank, and each row says in one byte which; `most` is how many tables
there are at most. The coder is that of the library `constriction` (asymmetric numeral systems, 32-bit words).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import SmeltError

Symbols = npt.NDArray[np.int32]
WEIGHT = (1 << 16) - 1  # heaviest weight of a symbol; probabilities are weights over their sum
ROUNDS = 8  # of assigning rows to tables; nothing moves after four to six on keys and values
CHECK = 4  # bytes of a checksum of the symbols: another version of the coder is found, not believed


@dataclass(frozen=True)
class Bank:
    """Tables of weights uint16 [K, S], K ≤ 256, and for each row the table `of` uint8 [C] that codes its symbols."""

    weights: npt.NDArray[np.uint16]
    of: npt.NDArray[np.uint8]

    def __post_init__(self) -> None:
        if self.weights.ndim != 2 or not 0 < len(self.weights) <= 256 or not self.weights.shape[1]:
            raise SmeltError(f"entropy tables must be [1 to 256, symbols], not {list(self.weights.shape)}")
        if self.weights.min() < 1 or (self.of.size and self.of.max() >= len(self.weights)):
            raise SmeltError("entropy tables: a symbol has no weight, or a row names a table that is not there")

    @property
    def nbytes(self) -> int:
        """What the tables and the choice of each row take."""
        return self.weights.nbytes + self.of.nbytes

    def costs(self) -> npt.NDArray[np.float64]:
        """Bits [K, S] that a symbol takes under each table."""
        weights = self.weights.astype(np.float64)
        bits: npt.NDArray[np.float64] = np.log2(weights.sum(1, keepdims=True)) - np.log2(weights)
        return bits

    def encode(self, rows: Sequence[Symbols]) -> bytes:
        """One stream of all rows' symbols, each below S; rows may differ in length."""
        self._check_rows(len(rows))
        coder, joined = _coder(), [np.ascontiguousarray(row, np.int32) for row in rows]
        check = 0
        for row in joined:
            if row.size and (row.min() < 0 or row.max() >= self.weights.shape[1]):
                raise SmeltError(f"entropy coding: symbols must lie in 0 to {self.weights.shape[1] - 1}")
            check = zlib.crc32(row.data, check)
        for table in range(len(self.weights)):
            mine = [joined[row] for row in np.flatnonzero(self.of == table)]
            if sum(row.size for row in mine):
                coder.encode_reverse(np.concatenate(mine), self._model(table))
        words: npt.NDArray[np.uint32] = coder.get_compressed()
        return check.to_bytes(CHECK, "little") + words.astype("<u4").tobytes()

    def decode(self, data: bytes, sizes: Sequence[int]) -> list[Symbols]:
        """Inverse of `encode` for rows of these sizes; raises SmeltError if the stream does not hold them."""
        self._check_rows(len(sizes))
        if len(data) < CHECK or (len(data) - CHECK) % 4:
            raise SmeltError(f"entropy coding: a stream of {len(data)} bytes is cut")
        words = np.frombuffer(data, "<u4", offset=CHECK).astype(np.uint32)
        if words.size and not words[-1]:
            raise SmeltError("entropy coding: the stream is damaged (its last word is zero)")
        coder = _coder(words)
        out: list[Symbols] = [np.empty(0, np.int32)] * len(sizes)
        for table in reversed(range(len(self.weights))):  # last in, first out
            mine = np.flatnonzero(self.of == table).tolist()
            ends = np.cumsum([sizes[row] for row in mine])
            if not len(mine) or not ends[-1]:
                continue
            symbols = coder.decode(self._model(table), int(ends[-1]))
            for row, piece in zip(mine, np.split(symbols, ends[:-1]), strict=True):
                out[row] = piece
        check = 0
        for piece in out:
            check = zlib.crc32(np.ascontiguousarray(piece).data, check)
        if check != int.from_bytes(data[:CHECK], "little") or not coder.is_empty():
            raise SmeltError(
                "entropy coding: the stream does not decode to the symbols it was made of; it is damaged, or was made "
                "by a version of constriction that codes otherwise"
            )
        return out

    def _check_rows(self, rows: int) -> None:
        if rows != self.of.size:
            raise SmeltError(f"entropy coding: {rows} rows, but the tables were made for {self.of.size}")

    def _model(self, table: int) -> Any:
        weights = self.weights[table].astype(np.float64)
        return _library().stream.model.Categorical(weights / weights.sum(), perfect=False)


def fit(counts: npt.NDArray[np.int64], most: int) -> Bank:
    """At most `most` tables for rows of these counts [C, S]: Lloyd's algorithm under the bits that rows would take."""
    if counts.ndim != 2 or not counts.size:
        raise SmeltError(f"entropy tables need counts [rows, symbols], not {list(counts.shape)}")
    tables = min(most, len(counts), 256)
    totals = np.maximum(counts.sum(1, keepdims=True), 1)
    shares = counts / totals
    spread = -(shares * np.log2(np.maximum(shares, 1e-12))).sum(1)
    of = np.empty(len(counts), np.uint8)
    of[np.argsort(spread, kind="stable")] = np.arange(len(counts)) * tables // len(counts)
    for _ in range(ROUNDS):
        bank = Bank(_weights(counts, of, tables), of)
        bits = counts @ bank.costs().T
        best = bits.argmin(1).astype(np.uint8)
        if (best == of).all():
            break
        of = best
    used, own = np.unique(of, return_inverse=True)
    of = own.astype(np.uint8)
    return Bank(_weights(counts, of, len(used)), of)


def _weights(counts: npt.NDArray[np.int64], of: npt.NDArray[np.uint8], tables: int) -> npt.NDArray[np.uint16]:
    """The joint counts of each table's rows, scaled so that the largest is `WEIGHT` and none is zero."""
    sums = np.zeros((tables, counts.shape[1]))
    np.add.at(sums, of, counts)
    scaled = sums * (WEIGHT / np.maximum(sums.max(1, keepdims=True), 1))
    weights: npt.NDArray[np.uint16] = np.clip(np.rint(scaled), 1, WEIGHT).astype(np.uint16)
    return weights


def _library() -> Any:
    try:
        return import_module("constriction")  # loaded when it is needed: it is an extra
    except ImportError as missing:
        raise SmeltError(
            "coding a cache into a bitstream needs the library constriction: pip install 'smelt[prefix]'"
        ) from missing


def _coder(words: npt.NDArray[np.uint32] | None = None) -> Any:
    coder = _library().stream.stack.AnsCoder
    return coder() if words is None else coder(words)
