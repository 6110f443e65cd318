"""Trained bfloat16 weights without loss: few bits for frequent exponents, all else as it is.

DFloat11: 70% Size, 100% Accuracy (Zhang et al., 2025, arXiv 2504.11651) codes exponents by Huffman's algorithm, whose
codes are found one behind the other. Codes of 2, 5 and 13 bits need some 0.2 bits more and are read sixty-four at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import sympy
import torch

from ..errors import SmeltError
from .base import Encoding, Parts
from .expr import Expr

ROWS, COLUMNS = 16, 4  # of the block that is decoded at once, element after element along its rows
FIRST, SECOND = 3, 7  # symbols that a tier tells apart; its last code sends on
SPARE = 64  # bytes behind the last of a list, so that a whole vector can be read from any place


@dataclass(frozen=True)
class Tiered(Encoding):
    """The exponents of a bfloat16 matrix `[N, K]` by how frequent they are; signs and mantissas as they are.

    Both bytes of a number swap their top bits: `low` is then sign and mantissa, and the symbol is the exponent with its
    lowest bit on top. Each element has two bits: one of the three most frequent symbols, or 3 for one that stands in
    the second tier. That has three bits for each of those: one of the next seven symbols, or 7 for one that stands in
    `rest` as it is. Elements come in blocks of four columns by sixteen rows.

    Parts, all uint8 but one: `low` `[N / 16, K * 16]`; `first` `[N / 16, K * 4]` and `second`, codes one behind the
    other from the lowest bit up; `rest`; `start` int64 `[N / 16, 2]`, where sixteen rows begin in the second tier and
    the rest; `table` `[16]`, the ten symbols. Rows are filled up to sixteen with copies of the last.

    counts: elements in the second tier and the rest. They come from the data, so that two matrices are stored alike
    whatever they are; `coded` finds them.
    """

    name: ClassVar[str] = "tiered"
    counts: tuple[int, ...] = field(default=(0, 0), compare=False)

    def __post_init__(self) -> None:
        if len(self.counts) != 2 or not all(type(count) is int and count >= 0 for count in self.counts):
            raise SmeltError(f"tiered: counts are two numbers of elements, not {self.counts!r}")

    @property
    def form(self) -> Tiered:
        """Without the counts."""
        return Tiered()

    @classmethod
    def coded(cls, x: torch.Tensor) -> tuple[Tiered, dict[str, torch.Tensor]]:
        """The encoding of a matrix and its parts. Raises SmeltError where a number is no bfloat16."""
        if reason := cls().refuses(tuple(x.shape)):
            raise SmeltError(f"tiered: {reason}")
        words = _ordered(_words(x))
        high, lower = (words >> 8).to(torch.uint8), words.to(torch.uint8)
        symbols, low = high & 127 | lower & 128, high & 128 | lower & 127
        order = torch.bincount(symbols, minlength=256).argsort(descending=True, stable=True)
        ranks = order.argsort().to(torch.uint8).index_select(0, symbols.int())
        tiles = -(-x.shape[0] // ROWS)
        passed = [(ranks >= rank).view(tiles, -1).sum(1) for rank in (FIRST, FIRST + SECOND)]
        beyond = ranks[ranks >= FIRST] - FIRST
        rest = FIRST + beyond[beyond >= SECOND].int()
        order = order.to(torch.uint8)
        parts = {
            "low": low.view(tiles, -1),
            "first": _packed(ranks.clamp_max(FIRST), 2).view(tiles, -1),
            "second": _spared(_packed(beyond.clamp_max(SECOND), 3)),
            "rest": _spared(order[rest]),
            "start": torch.stack([each.cumsum(0) - each for each in passed], 1),
            "table": order[:16].where(torch.arange(16, device=x.device) < FIRST + SECOND, 0),
        }
        return cls((len(beyond), len(rest))), parts

    def encode(self, x: torch.Tensor, tables: Parts | None = None) -> dict[str, torch.Tensor]:
        """The parts of a matrix that has just these counts."""
        found, parts = self.coded(x)
        if found.counts != self.counts:
            raise SmeltError(f"{self}: the matrix has {found}; `Tiered.coded` finds what its data needs")
        return parts

    def decode(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The same bits, in `dtype`."""
        table = parts["table"]
        codes = _codes(parts["first"], 2)
        symbols = table[codes.int()]
        left = (codes == FIRST).nonzero()[:, 0]
        codes = _codes(parts["second"][:-SPARE], 3)[: len(left)]
        symbols[left] = table[FIRST + codes.int()]
        left = left[codes == SECOND]
        symbols[left] = parts["rest"][: len(left)]
        symbol, low = symbols.short(), parts["low"].flatten().short()
        words = (low & 128 | symbol & 127) << 8 | symbol & 128 | low & 127
        return _rows(words, shape).view(torch.bfloat16).to(dtype)

    def stored_bits(self, shape: tuple[Any, ...]) -> sympy.Expr:
        """Signs, mantissas and codes of whole blocks, the lists as long as counted, places and symbols."""
        tiles = sympy.ceiling(sympy.sympify(shape[0]) / ROWS)
        second, rest = self.counts
        lists = 3 * -(-second // 8) + rest + 2 * SPARE
        return 10 * tiles * ROWS * shape[1] + 8 * lists + 128 * tiles + 8 * 16

    def expr(self, shape: tuple[Any, ...]) -> Expr:
        """None: where a value stands depends on all before it."""
        raise SmeltError(
            f"{self.name}: values are found only in the order in which they are stored, by kernels for CPUs"
        )

    def refuses(self, shape: tuple[int, ...]) -> str | None:
        """What is no matrix, or has rows of no whole blocks."""
        if len(shape) != 2:
            return f"needs a matrix [N, K], not {list(shape)}"
        if 0 in shape or shape[1] % COLUMNS:
            return f"rows of {shape[1]} are no multiple of {COLUMNS}"
        return None


def _words(x: torch.Tensor) -> torch.Tensor:
    """The 16 bits of each number."""
    if x.dtype is torch.bfloat16:
        return x.contiguous().view(torch.int16)
    bits = x.float().contiguous().view(torch.int32)
    if bool((bits & 0xFFFF).any()):
        raise SmeltError(f"tiered: the matrix is {str(x.dtype)[6:]} with numbers that bfloat16 would round")
    return (bits >> 16).short()


def _ordered(words: torch.Tensor) -> torch.Tensor:
    """A matrix [N, K] block by block; the last row again where sixteen are not full."""
    down = torch.arange(-(-len(words) // ROWS) * ROWS, device=words.device).clamp_max(len(words) - 1)
    blocks: torch.Tensor = words[down].unflatten(0, (-1, ROWS)).unflatten(2, (-1, COLUMNS))  # [N / 16, 16, K / 4, 4]
    return blocks.transpose(1, 2).flatten()


def _rows(words: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    blocks = words.view(-1, shape[1] // COLUMNS, ROWS, COLUMNS)
    return blocks.transpose(1, 2).reshape(-1, shape[1])[: shape[0]].contiguous()


def _packed(codes: torch.Tensor, width: int) -> torch.Tensor:
    """Codes of so many bits one behind the other, eight in `width` bytes, as uint8."""
    padded = torch.nn.functional.pad(codes, (0, -len(codes) % 8))
    bits = torch.stack([padded >> i & 1 for i in range(width)], 1).view(-1, 8)
    packed = bits[:, 0].clone()
    for i in range(1, 8):
        packed |= bits[:, i] << i
    return packed


def _codes(packed: torch.Tensor, width: int) -> torch.Tensor:
    """Codes, of `_packed`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.reshape(-1, 1) >> shifts & 1).view(-1, width)
    codes = bits[:, 0].clone()
    for i in range(1, width):
        codes |= bits[:, i] << i
    return codes


def _spared(part: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(part, (0, SPARE))
