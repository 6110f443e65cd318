"""The third bit of a code as products read it: a word of it lies over two words of the lower bits, nibble over nibble.

Encodings keep the upper bit of 3 in a plane of its own, sixteen columns to an int16, which suits kernels whose lanes
are columns. Where lanes are rows, a column costs a second shift and a second mask. Here that plane becomes bytes: a
block of 64 columns has 16 bytes of lower bits and 8 of upper ones, and in each nibble of the latter every bit falls on
one that a lower word can spare. So a bitwise choice between two words gives eight nibbles that hold a whole code each,
and a code is found by a shift and a table as one of 4 bits is. Nothing is added to what is stored, only moved.

In the inner loop 64 weights of one row of x take 14.0 instructions with AVX-512 (39.1 with the planes as stored; 13.4
for 4 bits, 12.7 for 2), and a product [4096, 1024] takes 0.78 of the time of 4 bits (two Zen 5 cores, 2026-11-22).
"""

from __future__ import annotations

from collections.abc import Mapping

import sympy
import torch

from ..ir.encoding.expr import Bin, Cast, Const, Expr, Index, Load, k, rebuilt, stored

BLOCK = 64  # columns


def beside(expr: Expr) -> Expr:
    """The expression with the upper bit of codes of 3 read from where `moved` puts it; rows must be whole blocks."""
    match expr:
        case Bin("add", Bin("and", _, Const(3)) as low, Bin("mul", upper, Const(4) as by)) if found := _bit(upper):
            return Bin("add", low, Bin("mul", found, by))
    return rebuilt(expr, beside, lambda index: index)


def moved(expr: Expr, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parts of a matrix as the expression `beside` reads them."""
    before = stored(expr)
    return {
        part: _bytes(parts[part]) if dtype != before[part] else parts[part]
        for part, dtype in stored(beside(expr)).items()
    }


def _bit(expr: Expr) -> Expr | None:
    """The read of one bit of an int16 as one of a byte, None for any other expression.

    Column `4 i + j + 16 f` of a block, whose lower bits are at `2 f` of byte `4 i + j`, goes to byte `4 (i / 2) + j`:
    to the nibble `f / 2`, above the lower bits where f is even and below where it is odd.
    """
    match expr:
        case Bin("and", Bin("shr", Cast("int32", Load(part, word, "int16")), Index(shift)), Const(1) as one):
            if shift.func is not sympy.Mod or shift.args[1] != 16:
                return None
            at = shift.args[0]
            start = sympy.expand(word - sympy.floor(at / 16))
            if k in start.free_symbols:
                return None
            byte = 8 * sympy.floor(at / BLOCK) + 4 * sympy.floor(sympy.Mod(at, 16) / 8) + sympy.Mod(at, 4)
            nibble = 4 * sympy.floor(sympy.Mod(at, BLOCK) / 32)
            bit = nibble + 2 - 2 * sympy.Mod(sympy.floor(at / 16), 2) + sympy.Mod(sympy.floor(at / 4), 2)
            return Bin("and", Bin("shr", Cast("int32", Load(part, 2 * start + byte, "uint8")), Index(bit)), one)
    return None


def _bytes(plane: torch.Tensor) -> torch.Tensor:
    """int16 `[..., K / 16]`, a bit a column, as uint8 `[..., K / 8]`."""
    shifts = torch.arange(8, dtype=torch.uint8)
    bits = plane.contiguous().view(torch.uint8)[..., None] >> shifts & 1  # of eight neighbours, the first lowest
    columns = bits.reshape(*plane.shape[:-1], -1, 2, 2, 2, 2, 4)  # blocks, f / 2, f % 2, i / 2, i % 2, j
    out = torch.zeros_like(columns[..., 0, 0, :, 0, :])
    for half in range(2):
        for odd in range(2):
            for i in range(2):
                out |= columns[..., half, odd, :, i, :] << 4 * half + 2 - 2 * odd + i
    return out.flatten(-3)
