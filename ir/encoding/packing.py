"""Codes of a few bits in memory: planes of 1, 2, 4 or 8 bits, packed along a row so that vectors unpack to vectors.

With `lanes` L a byte of a plane of w bits holds L-strided neighbours: in a block of L * 8 / w columns, byte j holds
columns j, j + L, j + 2L, ... from the lowest field up, so that L bytes unpack to L neighbouring columns at once. A
plane of one bit at 16 lanes is kept in int16 instead: an element holds sixteen neighbours, the first in its lowest bit,
and blocks stay short enough for heads of 64 channels. Other widths are two planes: 3 bits are 2 low ones and 1 high.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch

from .expr import Bin, Cast, Const, Expr, Index, Load, n

LANES = 16  # neighbouring columns in neighbouring bytes: one 64-byte vector of float32
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,), 9: (8, 1), 10: (8, 2), 12: (8, 4)}
PARTS = ("codes", "high")  # the low plane and, if there is one, the other


def widths(bits: int) -> dict[str, int]:
    """The part of each plane and its bits, low bits first."""
    return dict(zip(PARTS, PLANES[bits], strict=False))


def block(bits: int, lanes: int = LANES) -> int:
    """Columns that are packed together; a row must hold whole blocks."""
    return max(_columns(width, lanes) for width in PLANES[bits])


def pack(codes: torch.Tensor, bits: int, lanes: int = LANES) -> dict[str, torch.Tensor]:
    """Planes of integer codes [..., K] below 2^bits."""
    held, shift = {}, 0
    for part, width in widths(bits).items():
        plane = codes >> shift & (1 << width) - 1 if len(PLANES[bits]) > 1 else codes
        held[part] = _pack(plane, width, lanes)
        shift += width
    return held


def unpack(parts: Mapping[str, torch.Tensor], bits: int, columns: int, lanes: int = LANES) -> torch.Tensor:
    """Codes [..., K] of the planes, uint8 up to 8 bits, int32 above."""
    total: torch.Tensor | None = None
    shift = 0
    for part, width in widths(bits).items():
        plane = _unpack(parts[part], width, columns, lanes)
        plane = plane if bits <= 8 else plane.int()
        total = plane if total is None else total | plane << shift
        shift += width
    assert total is not None
    return total


def field(bits: int, columns: Any, at: sympy.Expr, lanes: int = LANES) -> Expr:
    """The int32 code at column `at` of row n, of rows of `columns` codes."""
    columns, total, shift = sympy.sympify(columns), None, 0
    for part, width in widths(bits).items():
        plane = _field(part, width, columns, at, lanes)
        if shift:
            plane = Bin("mul", plane, Const(1 << shift, "int32"))
        total = plane if total is None else Bin("add", total, plane)
        shift += width
    assert total is not None
    return total


def _words(width: int, lanes: int) -> bool:
    """Whether a plane is made of int16."""
    return width == 1 and lanes == LANES


def _columns(width: int, lanes: int) -> int:
    if width == 8 or _words(width, lanes):
        return 1 if width == 8 else LANES
    return lanes * 8 // width


def _pack(plane: torch.Tensor, width: int, lanes: int) -> torch.Tensor:
    if width == 8:
        return plane.to(torch.uint8)
    if _words(width, lanes):
        bits = torch.arange(LANES, device=plane.device)
        words = (plane.unflatten(-1, (plane.shape[-1] // LANES, LANES)).int() << bits).sum(-1)
        return torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16)
    fields = plane.to(torch.uint8).unflatten(-1, (plane.shape[-1] * width // (8 * lanes), 8 // width, lanes))
    packed: torch.Tensor = fields[..., 0, :].clone()
    for at in range(1, 8 // width):
        packed |= fields[..., at, :] << (width * at)
    return packed.flatten(-2)


def _unpack(plane: torch.Tensor, width: int, columns: int, lanes: int) -> torch.Tensor:
    if width == 8:
        return plane
    if _words(width, lanes):
        bits = torch.arange(LANES, device=plane.device)
        return (plane[..., None].int() >> bits & 1).to(torch.uint8).flatten(-2)
    fields = 8 // width
    blocks = plane.unflatten(-1, (columns // (lanes * fields), 1, lanes))
    shifts = (width * torch.arange(fields, dtype=torch.uint8, device=plane.device)).unsqueeze(-1)
    codes: torch.Tensor = (blocks >> shifts) & (1 << width) - 1
    return codes.flatten(-3)


def _field(part: str, width: int, columns: sympy.Expr, at: sympy.Expr, lanes: int) -> Expr:
    if width == 8:
        return Cast("int32", Load(part, n * columns + at, "uint8"))
    if _words(width, lanes):
        word, shift = n * (columns // LANES) + sympy.floor(at / LANES), sympy.Mod(at, LANES)
        return Bin("and", Bin("shr", Cast("int32", Load(part, word, "int16")), Index(shift)), Const(1, "int32"))
    fields = 8 // width
    within = sympy.Mod(at, lanes) if lanes > 1 else sympy.Integer(0)
    byte = n * (columns // fields) + lanes * sympy.floor(at / (lanes * fields)) + within
    shift = width * sympy.floor(sympy.Mod(at, lanes * fields) / lanes)
    shifted = Bin("shr", Cast("int32", Load(part, byte, "uint8")), Index(shift))
    return Bin("and", shifted, Const((1 << width) - 1, "int32"))
