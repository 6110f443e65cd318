"""The work of HyperAttention over prompts of given lengths, as tables that kernels walk: blocks, rectangles, parts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..ir.cache.hyper import Hyper, levels, starts


@dataclass(frozen=True)
class Layout:
    """Tables int32. `parts` lie by level; `until[l]` of them belong to the levels up to and with l.

    exact [N, 3]: row, first key, first query of each block of queries, the longest first.
    pieces [N, 5]: row, first, middle, end, level of each rectangle.
    parts [N, 7]: a piece, and which of how many blocks of it.
    starts [B, blocks of T]: the first key that a block of queries reads exactly, sinks aside.
    """

    exact: torch.Tensor
    pieces: torch.Tensor
    parts: torch.Tensor
    until: torch.Tensor
    starts: torch.Tensor


@functools.lru_cache(64)
def layout(lengths: tuple[int, ...], tokens: int, options: Hyper) -> Layout:
    """The tables of rows of these lengths, padded to `tokens`."""
    rows = [levels(length, options) for length in lengths]
    first = [starts(length, options) for length in lengths]
    exact = [(b, start, i * options.block) for b, row in enumerate(first) for i, start in enumerate(row)]
    exact.sort(key=lambda unit: unit[1] - unit[2])
    pieces = [
        (b, *rectangle, level)
        for level in range(max(map(len, rows)))
        for b, row in enumerate(rows)
        for rectangle in (row[level] if level < len(row) else ())
    ]
    blocks = [-(-(middle - low) // options.block) for _, low, middle, _, _ in pieces]
    parts = [(*piece, block, many) for piece, many in zip(pieces, blocks, strict=True) for block in range(many)]
    until = [sum(part[4] <= level for part in parts) for level in range(max(map(len, rows)))]
    width = -(-tokens // options.block)
    return Layout(
        _table(exact, 3),
        _table(pieces, 5),
        _table(parts, 7),
        torch.tensor(until, dtype=torch.int32),
        torch.tensor([row + [0] * (width - len(row)) for row in first], dtype=torch.int32),
    )


def _table(rows: Sequence[tuple[int, ...]], columns: int) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, columns)
