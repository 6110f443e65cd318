"""A fused product with few vectors on a GPU, in Triton: up to four rows of x, any weight encoding.

The encoding's tile expression is spliced into the loader of W. One program computes BLOCK_N outputs of all rows: every
weight is read and decoded once, scales multiply a group's sum. Sums are float32 and every row is summed in one order
whatever the number of rows. With SPLITS > 1 the columns are shared by that many programs; the last one to arrive adds
the partial sums in order, so that the result does not depend on which one it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..ir.encoding import Encoding
from ..ir.errors import SmeltError
from .autotune_triton import Tile
from .hoist import Term
from .printers import triton as printer
from .product_triton import ONE, Product, arguments, column_mask, finish, lines, terms, walk, whole
from .triton_module import load

PIECE = 32  # packed columns; triton 3.9 brings longer pieces of x to the threads by way of shared memory and barriers
ROWS = 4  # most rows of x: each takes a float32 sum an output and its own columns of x in registers
SIZES = ("N", "K", "x_row", "y_row")
SIDES = ("BLOCK_N", "BLOCK_C", "SPLITS", "STAGES", "UNROLL")


def source(product: Product | Encoding, rows: int = 1) -> str:
    """The kernel `gemv` for so many rows of x as a Python module."""
    product = product if isinstance(product, Product) else Product(product)
    if not 1 <= rows <= ROWS:
        raise SmeltError(f"gemv takes 1 to {ROWS} rows of x, not {rows}; gemm takes any number")
    columns = product.columns
    return _TEMPLATE.format(
        product=product,
        rows=rows,
        parts=", ".join(product.parts),
        norm=", gain, eps, offset" if product.norm else "",
        finish=finish(product),
        zeros=lines(1, _zeros(product, rows)),
        walk=lines(2, walk(columns)),
        body=lines(2, _body(product, rows)),
        normed=lines(1, _normed(product, rows)),
        partial=lines(2, _partial(product, rows)),
        joined=lines(3, _joined(product, rows)),
        done=lines(2, _done(product, rows)),
        whole=whole(columns),
        period=columns.period,
        lanes=columns.lanes,
    )


def signature(product: Product, dtype: str = "float32", bias: bool = False, residual: bool = False,
              splits: int = 1) -> dict[str, str]:  # fmt: skip
    """Triton's type of every argument of the kernel, for compiling ahead of time; `dtype` is that of x and y."""
    return arguments(product, dtype, bias, residual, splits, SIZES, SIDES)


def constants(product: Product, tile: Tile, rows: int = 1) -> dict[str, int]:
    """The compile-time arguments of a tile."""
    columns = product.columns
    block = columns.block(min(tile.block_k, PIECE * columns.fields))
    # registers for more rows come from fewer columns in flight, which changes no sum
    unroll = max(1, min(4, tile.block_k // (block * columns.fields)) // rows)
    return {
        "BLOCK_N": tile.block_n, "BLOCK_C": block, "SPLITS": tile.splits, "STAGES": tile.stages, "UNROLL": unroll,
    }  # fmt: skip


def kernel(product: Product | Encoding, rows: int = 1) -> Any:
    """The `triton.jit` function; `TritonProduct` launches it."""
    return load(source(product, rows), "gemv").gemv


def _sums(product: Product, rows: int) -> list[str]:
    return [f"{prefix}sum_{m}" for prefix in product.encodings for m in range(rows)]


def _zeros(product: Product, rows: int) -> Iterator[str]:
    for m in range(rows):
        yield f"x_{m} = x + tl.full((), {m}, tl.int64) * x_row"
    for each in _sums(product, rows):
        yield f"{each} = tl.zeros((BLOCK_N,), tl.float32)"
    if product.norm:
        for m in range(rows):
            yield f"squares_{m} = tl.zeros((BLOCK_C,), tl.float32)"


def _body(product: Product, rows: int) -> Iterator[str]:
    columns = product.columns
    masked = "" if columns.packed else ", mask=column_{} < K, other=0"
    for field in range(columns.fields):
        mask = masked.format(field)
        for m in range(rows):
            yield f"v_{m}_{field} = tl.load(x_{m} + column_{field}{mask}).to(tl.float32)"
        if product.norm:
            yield f"gain_{field} = offset + 1.0"
            yield "if gain is not None:"
            yield f"    gain_{field} = tl.load(gain + column_{field}{mask}).to(tl.float32) + offset"
            for m in range(rows):
                yield f"squares_{m} += v_{m}_{field} * v_{m}_{field}"
                yield f"v_{m}_{field} *= gain_{field}"
    found = {prefix: terms(product, prefix) for prefix in product.encodings}
    if any(factor is None for each in found.values() for _, factor in each[0]):
        for m in range(rows):
            total = " + ".join(f"v_{m}_{field}" for field in range(columns.fields))
            yield f"total_{m} = tl.sum({total}, axis=0)"
    for prefix, each in found.items():
        yield from _products(product, prefix, each, rows)


def _products(product: Product, prefix: str, fields: list[list[Term]], rows: int) -> Iterator[str]:
    mask = column_mask(product.columns)
    for t, (coefficient, factor) in enumerate(fields[0]):
        if factor is not None:
            yield "n = rows[:, None]"
        for field, each in enumerate(fields):
            if (value := each[t][1]) is not None:
                yield f"w_{field} = {printer.text(value, product.names(prefix), 'n < N', mask)}"
        by = ""
        if coefficient != ONE:
            yield "n = rows"
            yield f"by = {printer.text(coefficient, product.names(prefix), 'n < N')}"
            by = "by * "
        for m in range(rows):
            products = " + ".join(f"w_{field} * v_{m}_{field}[None, :]" for field in range(len(fields)))
            yield f"{prefix}sum_{m} += {by}{f'total_{m}' if factor is None else f'tl.sum({products}, axis=1)'}"


def _normed(product: Product, rows: int) -> Iterator[str]:
    if product.norm:
        for m in range(rows):
            yield f"square_{m} = tl.sum(squares_{m}, axis=0)"


def _partial(product: Product, rows: int) -> Iterator[str]:
    """Partial sums as rows of `work` [SPLITS, sums, N], those of squares behind them, once a block of outputs."""
    sums = _sums(product, rows)
    for i, each in enumerate(sums):
        yield f"tl.store(work + (part * {len(sums)} + {i}) * N + rows, {each}, mask=rows < N)"
    if product.norm:
        yield f"square = work + {len(sums)} * SPLITS * N + tl.program_id(0) * SPLITS * {rows}"
        for m in range(rows):
            yield f"tl.store(square + part * {rows} + {m}, square_{m})"


def _joined(product: Product, rows: int) -> Iterator[str]:
    sums = _sums(product, rows)
    squares = [f"square_{m}" for m in range(rows)] if product.norm else []
    for each in sums:
        yield f"all_{each} = tl.zeros((BLOCK_N,), tl.float32)"
    for each in squares:
        yield f"all_{each} = 0.0"
    yield "for s in range(0, SPLITS):"
    for i, each in enumerate(sums):
        at = f"work + (s * {len(sums)} + {i}) * N + rows"
        yield f'    all_{each} += tl.load({at}, mask=rows < N, other=0, cache_modifier=".cg")'
    for m, each in enumerate(squares):
        yield f'    all_{each} += tl.load(square + s * {rows} + {m}, cache_modifier=".cg")'
    yield from _done(product, rows, "all_")


def _done(product: Product, rows: int, prefix: str = "") -> Iterator[str]:
    for m in range(rows):
        scale = f" * tl.rsqrt({prefix}square_{m} / K + eps)" if product.norm else ""
        up = f"{prefix}up_sum_{m}{scale}" if product.up else "None"
        at = f"tl.full((), {m}, tl.int64)"
        yield f"finish({prefix}sum_{m}{scale}, {up}, y, bias, residual, {at}, rows, N, rows < N, y_row)"


_TEMPLATE = '''\
"""{rows} x {product}: a product with W [N, K] read once"""

import triton
import triton.language as tl


{finish}

@triton.jit
def gemv(
    {parts}, x, y{norm}, bias, residual, work, arrived, N, K, x_row, y_row,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, UNROLL: tl.constexpr,
):{whole}
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1).to(tl.int64)
    steps = tl.cdiv(tl.cdiv(K, {period}) * {lanes}, BLOCK_C)
    share = tl.cdiv(steps, SPLITS)
    first = tl.program_id(1) * share
{zeros}
    for step in tl.range(first, tl.minimum(first + share, steps), num_stages=STAGES, loop_unroll_factor=UNROLL):
{walk}
{body}
{normed}
    if SPLITS > 1:
{partial}
        tl.debug_barrier()  # every thread's partial sums stand before the arrival is counted
        if tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel") == SPLITS - 1:
{joined}
            tl.store(arrived + tl.program_id(0), 0)
    else:
{done}
'''
