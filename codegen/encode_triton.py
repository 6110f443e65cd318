"""Affine encoding on a GPU, in Triton: pages of a cache, or any matrices, to codes, scales and zeros in one launch.

Bit for bit what `Affine.encode` makes, but for its refusals: a NaN or a scale that its type cannot hold is not noticed
here. A program holds whole groups; the columns of a byte are fields of one packed column, as in the products.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ..ir.encoding import Affine, Encoding, Parts
from ..ir.encoding.packing import LANES
from ..ir.errors import SmeltError
from .product_triton import POINTERS, lines
from .triton_module import load

ELEMENTS = 2048  # of a program's tile


@dataclass(frozen=True)
class _Walk:
    """How programs share a matrix [n, k]: blocks of rows, and blocks of packed columns within `rows` x `packed`.

    aligned: a row's groups hold whole bytes, and a block is a group. Otherwise the columns of a byte may lie in several
    groups and look at them themselves.
    """

    encoding: Affine
    n: int
    k: int

    @property
    def fields(self) -> int:
        return 8 // self.encoding.width

    @property
    def channel(self) -> bool:
        return self.encoding.axis == "channel"

    @property
    def group(self) -> int:
        return self.encoding.group or self.k

    @property
    def aligned(self) -> bool:
        return not self.channel and self.group % self.encoding.block == 0

    @property
    def rows(self) -> int:
        """Rows of a block: a group of them, or a power of two."""
        if self.channel:
            return self.group
        return max(1, min(ELEMENTS // (_power(self.packed) * self.fields), _power(self.n)))

    @property
    def packed(self) -> int:
        """Packed columns of a block: those of a group, or a power of two."""
        if self.aligned:
            return self.group // self.fields
        most = max(LANES, ELEMENTS // (_power(self.group) * self.fields)) if self.channel else 4 * LANES
        return min(most, _power(self.k // self.fields))

    @property
    def grid(self) -> tuple[int, int]:
        return -(-self.n // self.rows), -(-(self.k // self.fields) // self.packed)

    @property
    def warps(self) -> int:
        """Enough for 16 elements a thread: twice as many take over 128 registers."""
        return max(1, min(16, _power(self.rows) * _power(self.packed) * self.fields // 512))

    def column(self, field: int) -> str:
        """The column of packed column k."""
        if self.fields == 1:
            return "k"
        return f"{LANES * self.fields} * (k // {LANES}) + {LANES * field} + k % {LANES}"


def source(encoding: Affine, shape: tuple[int, int]) -> str:
    """The kernel `encode` for matrices [N, K] as a Python module; SmeltError where the encoding refuses the shape."""
    if why := encoding.refuses(shape) or ("its codes lie in two planes" if encoding.planes > 1 else None):
        raise SmeltError(f"{encoding}: {why}")
    walk, width, info = _Walk(encoding, *shape), encoding.width, torch.finfo(getattr(torch, encoding.scale))
    levels = 2**width - 1 if encoding.zero else 2 ** (width - 1) - 1
    return _TEMPLATE.format(
        encoding=encoding,
        shape=list(shape),
        span=(_ABOVE_ZERO if encoding.zero else _SYMMETRIC).format(dtype=encoding.scale),
        dtype=encoding.scale,
        levels=levels,
        least=0 if encoding.zero else -levels,
        offset=0 if encoding.zero else 2 ** (width - 1),
        normal=info.smallest_normal,
        tiny=info.smallest_normal * info.eps,
        zero=", zero" if encoding.zero else "",
        zero_page=", zero_page" if encoding.zero else "",
        move_zero="    zero += page * zero_page\n" if encoding.zero else "",
        rows=walk.rows,
        rows_block=_power(walk.rows),
        packed=walk.packed,
        packed_block=_power(walk.packed),
        n=walk.n,
        packed_all=walk.k // walk.fields,
        body=lines(1, _body(walk)),
    )


def signature(encoding: Affine, dtype: str = "float32") -> dict[str, str]:
    """Triton's type of every argument of the kernel, for compiling ahead of time; `dtype` is that of x."""
    parts = {"codes": "*u8", **dict.fromkeys(["scale", *(["zero"] * encoding.zero)], POINTERS[encoding.scale])}
    steps = ("x_page", "x_row", *(f"{part}_page" for part in parts))
    return {"x": POINTERS[dtype], **parts, **dict.fromkeys(steps, "i32")}


def warps(encoding: Affine, shape: tuple[int, int]) -> int:
    """Warps of a program."""
    return _Walk(encoding, *shape).warps


@cache
def kernel(encoding: Affine, shape: tuple[int, int]) -> Any:
    """The `triton.jit` function for matrices [N, K]."""
    return load(source(encoding, shape), "encode").encode


def encode(encoding: Affine, x: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> None:
    """Write the parts of x [L, N, K]; x's rows are contiguous, and so is each part behind its first dim.

    A page that leaves a tail is `tail[row, :, first:last]`; its place in the body is `part[row, :, slot]`.
    """
    shape = (int(x.shape[1]), int(x.shape[2]))
    ordered = [parts[name] for name in ("codes", "scale", *(["zero"] * encoding.zero))]
    if x.stride(2) != 1 or any(not part[:1].is_contiguous() for part in ordered):
        raise SmeltError(f"{encoding}: the rows of x, and each part behind its first dim, must be contiguous")
    kernel(encoding, shape)[(x.shape[0], *_Walk(encoding, *shape).grid)](
        x, *ordered, x.stride(0), x.stride(1), *(part.stride(0) for part in ordered), num_warps=warps(encoding, shape)
    )


def encoded(encoding: Encoding, x: torch.Tensor, tables: Parts | None = None) -> Parts:
    """The parts of x [..., N, K], as `encoding.encode` makes them; by the kernel where the encoding has one."""
    if not isinstance(encoding, Affine) or encoding.planes > 1:
        return encoding.encode(x, tables)
    lead, shape = x.shape[:-2], (int(x.shape[-2]), int(x.shape[-1]))
    parts = {
        name: torch.empty(*lead, *like, dtype=dtype, device=x.device) for name, like, dtype in _likes(encoding, shape)
    }
    encode(encoding, x.reshape(-1, *shape), {name: part.flatten(0, len(lead) - 1) for name, part in parts.items()})
    return parts


@cache
def _likes(encoding: Affine, shape: tuple[int, int]) -> list[tuple[str, torch.Size, torch.dtype]]:
    """Names, shapes and types of the parts of one matrix."""
    return [(name, part.shape[1:], part.dtype) for name, part in encoding.encode(torch.zeros(1, *shape)).items()]


def _power(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _body(walk: _Walk) -> Iterator[str]:
    fields, group = range(walk.fields), walk.group
    for f in fields:
        yield f"column_{f} = {walk.column(f)}"
        yield f"x_{f} = tl.load(x + n * x_row + column_{f}, mask=inside, other=0).to(tl.float32)"
        yield f'low_{f} = tl.where(inside, x_{f}, float("inf"))'
        yield f'high_{f} = tl.where(inside, x_{f}, float("-inf"))'
    if walk.aligned:
        yield "low, high = low_0, high_0"
        for f in fields[1:]:
            yield f"low, high = tl.minimum(low, low_{f}), tl.maximum(high, high_{f})"
        yield "zeros, scales = stored(tl.min(low, 1, keep_dims=True), tl.max(high, 1, keep_dims=True))"
        yield from _store(walk, f"n * {walk.k // group} + tl.program_id(2)", f"n < {walk.n}", "")
    for f in fields if not walk.aligned else ():
        if walk.channel:
            low, high = (f"tl.{how}({end}_{f}, 0, keep_dims=True)" for how, end in (("min", "low"), ("max", "high")))
            yield f"zeros_{f}, scales_{f} = stored({low}, {high})"
            at = f"tl.program_id(1) * {walk.k} + column_{f}"
            yield from _store(walk, at, f"k < {walk.k // walk.fields}", f"_{f}")
            continue
        yield f"for i in range({group}):"
        yield f"    at = n * x_row + column_{f} // {group} * {group} + i"
        yield "    each = tl.load(x + at, mask=inside, other=0).to(tl.float32)"
        yield f"    low_{f} = tl.minimum(low_{f}, each)"
        yield f"    high_{f} = tl.maximum(high_{f}, each)"
        yield f"zeros_{f}, scales_{f} = stored(low_{f}, high_{f})"
        at, first = f"n * {walk.k // group} + column_{f} // {group}", f"column_{f} % {group} == 0"
        yield from _store(walk, at, f"inside & ({first})", f"_{f}")
    end = "" if walk.aligned else "_{}"
    for f in fields:
        code = f"code(x_{f}, zeros{end}, scales{end}) << {walk.encoding.width * f}".format(f, f)
        yield f"packed = {code}" if f == 0 else f"packed |= {code}"


def _store(walk: _Walk, at: str, mask: str, end: str) -> Iterator[str]:
    for part, values in (("scale", "scales"), ("zero", "zeros")):
        if part == "scale" or walk.encoding.zero:
            yield f"tl.store({part} + {at}, {values}{end}.to(tl.{walk.encoding.scale}), mask={mask})"


_SYMMETRIC = """\
    zero = tl.zeros_like(low)
    span = tl.maximum(high, -low)"""
_ABOVE_ZERO = """\
    zero = low.to(tl.{dtype}).to(tl.float32)
    span = tl.maximum(high - zero, 0.0)"""

_TEMPLATE = '''\
"""{encoding} of matrices {shape}"""

import triton
import triton.language as tl


@triton.jit
def stored(low, high):
    """Zero and scale of groups as they are stored: among the subnormals of their type scales are rounded up."""
{span}
    scale = tl.div_rn(span, {levels}.0 + tl.zeros_like(span)).to(tl.{dtype}).to(tl.float32)
    short = (scale * {levels}.0 < span) & (scale < {normal!r})
    return zero, tl.where(short, scale + {tiny!r}, scale)


@triton.jit
def code(x, zero, scale):
    """Codes of a tile; adding 1.5 * 2^23 rounds to the nearest integer, halves to even."""
    above = x - zero
    q = tl.div_rn(above, tl.where(scale == 0, 1.0, scale) + tl.zeros_like(above))
    q = (q + 12582912.0) - 12582912.0
    return (tl.minimum(tl.maximum(q, {least}.0), {levels}.0) + {offset}.0).to(tl.int32)


@triton.jit
def encode(x, codes, scale{zero}, x_page, x_row, codes_page, scale_page{zero_page}):
    page = tl.program_id(0).to(tl.int64)
    x += page * x_page
    codes += page * codes_page
    scale += page * scale_page
{move_zero}\
    i, j = tl.arange(0, {rows_block})[:, None], tl.arange(0, {packed_block})[None, :]
    n = tl.program_id(1).to(tl.int64) * {rows} + i
    k = tl.program_id(2) * {packed} + j
    inside = (i < {rows}) & (n < {n}) & (j < {packed}) & (k < {packed_all})
{body}
    tl.store(codes + n * {packed_all} + k, packed.to(tl.uint8), mask=inside)
'''
