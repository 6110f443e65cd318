"""How much attention dense keys get, as a C++ kernel. The reference is `column_sums` of `ir/cache/score.py`."""

from __future__ import annotations

from functools import cache

import torch

from ..ir.cache.score import Asked
from ..ir.errors import SmeltError
from .attention_header import HEADER
from .attention_loaders import dense_row
from .mass_template import KERNEL
from .printers.cpp import CTYPES
from .rows_source import MATH
from .unit import Function, call

CHUNK = 256  # keys of a unit of work: in float32 with 128 channels 128 kB
SCRATCH = 1 << 22  # floats that the logits of a block of queries may take, 16 MiB
BLOCK = 64  # most queries of a block


@cache
def function(heads: int, groups: int, dim: int, dtype: str) -> Function:
    """The kernel for keys of `dim` numbers of a stored type, `heads` query heads and `groups` KV heads."""
    if dtype not in ("float32", "float16", "bfloat16"):
        raise SmeltError(f"mass: keys are float32, float16 or bfloat16, not {dtype}; decode them")
    text = KERNEL.substitute(
        name="$name",
        heads=heads,
        groups=groups,
        dim=dim,
        chunk=CHUNK,
        dense=CTYPES[dtype],
        key_row="\n".join("  " + line for line in dense_row(dtype, dim)),
    )
    return Function.of(f"mass.{heads}x{groups}x{dim}.{dtype}", text, (MATH, HEADER))


def scratch(heads: int, groups: int, dim: int, keys: int, queries: int) -> tuple[int, int]:
    """Floats of scratch, and the queries that they serve at once."""
    chunks, row = -(-keys // CHUNK), -(-keys // 16) * 16 + -(-dim // 16) * 16
    each = heads * (row + 2 * chunks) + groups * chunks
    block = max(1, min(BLOCK, queries, SCRATCH // each))
    return block * each, block


def column_sums(asked: Asked) -> torch.Tensor:
    """`ir.cache.score.column_sums` by the kernel, float32 [H, S]."""
    (heads, new, dim), (groups, stored, _) = asked.q.shape, asked.k.shape
    q, k_at = asked.q.float(), asked.k_positions
    size, block = scratch(heads, groups, dim, stored, new)
    out, work = torch.empty(heads, stored), torch.empty(size)
    call(
        function(heads, groups, dim, str(asked.k.dtype).removeprefix("torch.")),
        *(q, q.stride(0), asked.k, asked.k.stride(0), asked.q_positions, k_at),
        k_at.stride(0) if len(k_at) > 1 else 0,
        *(asked.sinks, out, work, new, stored, block, asked.window or 0, int(asked.length)),
        *(float(asked.scale), float(asked.softcap or 0.0)),
        writes=[out, work],
    )()
    return out
