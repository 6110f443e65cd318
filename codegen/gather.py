"""Row lookup in C++: `y[m, :] = W[ids[m], :]` with W in any encoding, so that a table is never decoded as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch

from ..ir.encoding import Encoding
from ..ir.encoding.expr import k, n, stored
from ..ir.errors import SmeltError
from ..ir.weight import Weight
from .printers import cpp
from .rows import RowKernel
from .unit import Call, Function, call
from .walk import struct, walked
from .walk import text as declared_walk


def gather_kernel(weight: Weight) -> RowKernel | str:
    """The lookup kernel of a table, or why there is none."""
    if len(weight.shape) != 2:
        return f"a table must be two-dimensional, not {list(weight.shape)}"
    if not walked(weight.encoding):
        expr = weight.encoding.expr((None, weight.shape[1]))
        if expr.dtype != "float32":
            return f"the table's values are {expr.dtype}, not float32"
        if strange := [dtype for dtype in stored(expr).values() if dtype not in cpp.CTYPES]:
            return f"{weight.encoding} stores {strange[0]}, which no kernel loads"
    name = f"gather.{weight.encoding.name}"
    return RowKernel(name, gather_function(weight.encoding, weight.shape[1]).source, partial(_bind, weight, name))


@cache
def gather_function(encoding: Encoding, width: int) -> Function:
    """A lookup in rows of `width` values; parts are passed in the order of their names.

    Its last word is the first place of an id that is not a row of the table, or -1.
    """
    dtypes = _dtypes(encoding, width)
    declared = [f"const {cpp.CTYPES[dtypes[part]]}* p_{part} = (const {cpp.CTYPES[dtypes[part]]}*)c[{5 + i}];"
                for i, part in enumerate(sorted(dtypes))]  # fmt: skip
    names = {part: f"p_{part}" for part in dtypes}
    if walked(encoding):
        row = _WALK.format(struct=struct(encoding), parts=", ".join(names.values()), row=n.name, width=width)
    else:
        value = cpp.scalar(encoding.expr((None, width)), names)
        row = f"for (int64_t {k.name} = 0; {k.name} < {width}; {k.name}++) y[{k.name}] = {value};"
    text = f"""
// ids, y, m, rows of the table, its parts, and where the first wrong id stands
static void $name(Rank& rank, const int64_t* c) {{
  {" ".join(declared)}
  share(rank, c[3], [&](int64_t r) {{
    const int64_t {n.name} = ((const int64_t*)c[1])[r];
    float* y = (float*)c[2] + r * {width};
    if ({n.name} < 0 || {n.name} >= c[4]) {{
      __atomic_store_n((int64_t*)c + {5 + len(dtypes)}, r, __ATOMIC_RELAXED);
      return;
    }}
    {row}
  }});
}}
"""
    return Function.of(f"gather.{encoding.name}", text, (declared_walk(encoding),) if walked(encoding) else ())


_WALK = """{struct} walk({parts}, {row} / 16, {width});  // one row of the sixteen that are read
    for (int64_t k = 0; k < {width}; k += 4) {{
      f32x16 read[4];
      walk.next(read);
      for (int i = 0; i < 4; i++) y[k + i] = read[i][{row} % 16];
    }}"""


def _dtypes(encoding: Encoding, width: int) -> dict[str, str]:
    """The parts that a lookup reads and how they are stored."""
    return walked(encoding) or stored(encoding.expr((None, width)))


def _bind(weight: Weight, name: str, args: Mapping[str, Any], out: torch.Tensor) -> Call:
    ids: torch.Tensor = args["ids"]
    parts = _parts(weight, name)
    function = gather_function(weight.encoding, weight.shape[1])
    made = call(function, ids, out, ids.numel(), weight.shape[0], *parts, -1, writes=[out], work=8 * out.numel())
    words, last = made.words, len(made.words) - 1

    def check() -> None:
        at, words[last] = words[last], -1
        if at >= 0:
            raise SmeltError(f"id {int(ids.reshape(-1)[at])} is not one of the table's {weight.shape[0]} rows")

    made.check = check
    return made


def _parts(weight: Weight, name: str) -> list[torch.Tensor]:
    """The stored parts that the kernel reads, in its order; SmeltError where they do not hold the table."""
    dtypes = _dtypes(weight.encoding, weight.shape[1])
    parts = {part: weight.parts[part].contiguous() for part in sorted(dtypes)}
    for part, tensor in parts.items():
        if str(tensor.dtype) != f"torch.{dtypes[part]}":
            raise SmeltError(f"{name}: part '{part}' is {tensor.dtype}, not {dtypes[part]}")
    bits = 8 * sum(tensor.numel() * tensor.itemsize for tensor in parts.values())
    if bits != weight.bits:
        raise SmeltError(f"{name}: the parts hold {bits} bits, a table of {list(weight.shape)} has {weight.bits}")
    return list(parts.values())
