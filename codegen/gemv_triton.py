"""Matrix times few vectors on a GPU, in Triton: `y[M, N] = x[M, K] @ W[N, K]^T (+ bias[N])`, W in any encoding.

The encoding's tile expression is spliced into the loader of W. One program computes BLOCK_N outputs of one row of x,
walks K in tiles of BLOCK_K and accumulates in float32: a row's result does not depend on the batch that it is in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from ..ir.encoding import Encoding
from ..ir.encoding.expr import loads
from ..ir.errors import SmeltError
from .printers import triton as printer
from .triton_module import load

K = sympy.Symbol("K", integer=True, positive=True)
POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16", "int32": "*i32", "int8": "*i8", "uint8": "*u8"}


@dataclass(frozen=True)
class Tile:
    """Outputs and columns a step, and warps; both tile sides are powers of two.

    8 x 256 takes 39 to 72 registers on sm_90 (triton 3.9), 16 x 256 up to 250.
    """

    block_n: int = 8
    block_k: int = 256
    warps: int = 4


def source(encoding: Encoding) -> str:
    """The kernel `gemv` as a Python module; raises SmeltError for an encoding whose values are not float32."""
    expr = encoding.expr((None, K))
    if expr.dtype != "float32":
        raise SmeltError(f"gemv does not cover {encoding}: its values are {expr.dtype}, not float32")
    return _TEMPLATE.format(
        encoding=encoding,
        parts=", ".join(_parts(encoding)),
        value=printer.text(expr, row_mask="n < N", column_mask="k < K"),
    )


def signature(encoding: Encoding, bias: bool) -> dict[str, str]:
    """Triton's type of every argument of the kernel, for compiling ahead of time."""
    return {
        **{part: POINTERS[dtype] for part, dtype in _parts(encoding).items()},
        "x": "*fp32", "y": "*fp32", "bias": "*fp32" if bias else "constexpr",
        "N": "i32", "K": "i32", "HAS_BIAS": "constexpr", "BLOCK_N": "constexpr", "BLOCK_K": "constexpr",
    }  # fmt: skip


def kernel(encoding: Encoding) -> Any:
    """The `triton.jit` function, for `launch`."""
    return load(source(encoding), "gemv").gemv


def launch(
    kernel: Any,
    parts: Mapping[str, torch.Tensor],
    x: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    tile: Tile = Tile(),
) -> None:
    """One launch: `out[M, N] = x[M, K] @ W^T + bias`; all float32 and contiguous, parts by name."""
    (m, columns), rows = x.shape, out.shape[-1]
    kernel[(-(-rows // tile.block_n), m)](
        **parts, x=x, y=out, bias=bias, N=rows, K=columns,
        HAS_BIAS=bias is not None, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, num_warps=tile.warps,
    )  # fmt: skip


def _parts(encoding: Encoding) -> dict[str, str]:
    return {load.part: load.dtype for load in loads(encoding.expr((None, K)))}


_TEMPLATE = '''\
"""y[M, N] = x[M, K] @ W[N, K]^T (+ bias), W stored as {encoding}"""

import triton
import triton.language as tl


@triton.jit
def gemv({parts}, x, y, bias, N, K, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    m = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = rows[:, None]
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        k = columns[None, :]
        w = {value}
        v = tl.load(x + m * K + columns, mask=columns < K, other=0)
        acc += tl.sum(w * v[None, :], axis=1)
    if HAS_BIAS:
        acc += tl.load(bias + rows, mask=rows < N, other=0)
    tl.store(y + m * N + rows, acc, mask=rows < N)
'''
