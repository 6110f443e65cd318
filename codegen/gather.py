"""Row lookup in C++: `y[m, :] = W[ids[m], :]` with W in any encoding, so that a table is never decoded as a whole."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch

from ..ir.encoding import Encoding
from ..ir.encoding.expr import k, loads, n
from ..ir.errors import SmeltError
from ..ir.weight import Weight
from .plan import Run
from .printers import cpp
from .rows import RowKernel, fixed


def gather_kernel(weight: Weight) -> RowKernel | str:
    """The lookup kernel of a table, or why there is none."""
    if len(weight.shape) != 2:
        return f"a table must be two-dimensional, not {list(weight.shape)}"
    expr = weight.encoding.expr((None, weight.shape[1]))
    if expr.dtype != "float32":
        return f"the table's values are {expr.dtype}, not float32"
    if strange := [load.dtype for load in loads(expr) if load.dtype not in cpp.CTYPES]:
        return f"{weight.encoding} stores {strange[0]}, which no kernel loads"
    name = f"gather.{weight.encoding.name}"
    return RowKernel(name, gather_source(weight.encoding, weight.shape[1]), partial(_bind, weight, name))


@cache
def gather_source(encoding: Encoding, width: int) -> str:
    """The C++ of a lookup in rows of `width` values; parts are passed in the order of their names.

    Returns the first place of an id that is not a row of the table, or -1.
    """
    expr = encoding.expr((None, width))
    dtypes = {load.part: load.dtype for load in loads(expr)}
    params = "".join(f", const {cpp.CTYPES[dtypes[part]]}* p_{part}" for part in sorted(dtypes))
    value = cpp.scalar(expr, {part: f"p_{part}" for part in dtypes})
    return (
        cpp.PRELUDE
        + f"""
extern "C" int64_t gather(const int64_t* ids, float* y, int64_t m, int64_t rows{params}) {{
  for (int64_t r = 0; r < m; r++) {{
    const int64_t {n.name} = ids[r];
    if ({n.name} < 0 || {n.name} >= rows) return r;
    for (int64_t {k.name} = 0; {k.name} < {width}; {k.name}++) y[r * {width} + {k.name}] = {value};
  }}
  return -1;
}}
"""
    )


def _bind(weight: Weight, name: str, library: ctypes.CDLL, args: Mapping[str, Any], out: torch.Tensor) -> Run:
    ids: torch.Tensor = args["ids"]
    parts = _parts(weight, name)
    function = library.gather
    function.restype = ctypes.c_int64
    words = fixed((ids, out, ids.numel(), weight.shape[0], *parts))

    def run() -> None:
        at = function(*words)
        if at >= 0:
            raise SmeltError(f"id {int(ids.reshape(-1)[at])} is not one of the table's {weight.shape[0]} rows")

    run.keeps = (out, parts)  # type: ignore[attr-defined]  # the addresses are only valid while the tensors live
    return run


def _parts(weight: Weight, name: str) -> list[torch.Tensor]:
    """The stored parts that the kernel reads, in its order; SmeltError where they do not hold the table."""
    stored = {load.part: load.dtype for load in loads(weight.encoding.expr((None, weight.shape[1])))}
    parts = {part: weight.parts[part].contiguous() for part in sorted(stored)}
    for part, tensor in parts.items():
        if str(tensor.dtype) != f"torch.{stored[part]}":
            raise SmeltError(f"{name}: part '{part}' is {tensor.dtype}, not {stored[part]}")
    bits = 8 * sum(tensor.numel() * tensor.itemsize for tensor in parts.values())
    if bits != weight.bits:
        raise SmeltError(f"{name}: the parts hold {bits} bits, a table of {list(weight.shape)} has {weight.bits}")
    return list(parts.values())
