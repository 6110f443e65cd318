"""How much attention dense keys get, as a C++ kernel: column sums for scores, or a mass per query for running ones.

The reference is `column_mass` and `query_mass` of `ir/cache/score.py`.
"""

from __future__ import annotations

from functools import cache

import torch

from ..ir.cache.score import Normalize, Reduce, reduced, seen_by
from ..ir.errors import SmeltError
from .attention_header import HEADER
from .attention_loaders import dense_row
from .mass_template import KERNEL
from .printers.cpp import CTYPES
from .rows_source import MATH
from .unit import Call, Function, call

CHUNK = 256  # keys of a unit of work: in float32 with 128 channels 128 kB
SCRATCH = 1 << 22  # floats that the logits of a block of queries may take, 16 MiB
BLOCK = 64  # most queries of a block
KEYS = 15  # the word that says how many keys there are: a buffer may hold more
REDUCE = {"mean": 1, "max": 2, "sum": 3}


@cache
def function(heads: int, groups: int, dim: int, dtype: str) -> Function:
    """The kernel for keys of `dim` numbers of a stored type, `heads` query heads and `groups` KV heads."""
    if heads % groups:
        raise SmeltError(f"mass: {heads} query heads do not share {groups} KV heads evenly")
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


def bind(
    q: torch.Tensor,
    keys: torch.Tensor,
    q_positions: torch.Tensor,
    k_positions: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    length: bool = False,
    each: Reduce | None = None,
    visible: torch.Tensor | None = None,
    fresh: int = 0,
    work: torch.Tensor | None = None,
) -> Call:
    """The call that sets `out` to the mass of keys [G, S, D] from queries q [H, n, D] float32.

    out [H, S] sums over the queries; with `each`, a reduction over the query heads of a KV head, out is [n, G, S].
    Positions int64 [n] and [G or 1, S]: a key at a position beyond all others is a hole that nobody sees. `visible`
    int64 [n, ceil(fresh / 64)]: bits that say which of the last `fresh` keys, a step's own, a query sees. `length`
    multiplies each query's softmax by the keys that it sees. `words[KEYS]` may be lowered when a buffer is filled
    in part; what lies behind is not written. `work`: scratch that calls of one order may share.
    """
    heads, new, dim = q.shape
    groups, stored, _ = keys.shape
    shape = (new, groups, stored) if each else (heads, stored)
    good = q.dtype is torch.float32 and q.stride(-1) == 1 and keys.stride()[1:] == (dim, 1) and keys.shape[2] == dim
    good = good and out.shape == shape and out.dtype is torch.float32 and out.is_contiguous()
    good = good and k_positions.shape in ((1, stored), (groups, stored)) and k_positions.stride(-1) == 1
    good = good and q_positions.shape == (new,) and q_positions.is_contiguous()
    good = good and q_positions.dtype == k_positions.dtype == torch.int64
    if not good:
        raise ValueError(
            f"mass: needed are q float32 [H, n, D], keys [G, S, D], int64 positions [n] and [G or 1, S], and out "
            f"{list(shape)}, each contiguous in its last dims, not {list(q.shape)}, {list(keys.shape)}, "
            f"{list(q_positions.shape)}, {list(k_positions.shape)} and {list(out.shape)}"
        )
    if visible is not None and (visible.shape != (new, -(-fresh // 64)) or visible.dtype is not torch.int64):
        raise ValueError(
            f"mass: visible is int64 [{new}, {-(-fresh // 64)}], not {visible.dtype} {list(visible.shape)}"
        )
    size, block = scratch(heads, groups, dim, stored, new)
    work = torch.empty(size) if work is None or work.numel() < size else work
    return call(
        function(heads, groups, dim, str(keys.dtype).removeprefix("torch.")),
        *(q, *q.stride()[:2], keys, keys.stride(0), q_positions, k_positions),
        k_positions.stride(0) if len(k_positions) > 1 else 0,
        *(visible, fresh if visible is not None else 0, sinks, out, work, new, stored, stored, block),
        *(window or 0, int(length), REDUCE[each] if each else 0, float(scale), float(softcap or 0.0)),
        writes=[out, work],
    )


def column_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    q_positions: torch.Tensor,
    k_positions: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    normalize: Normalize = "none",
    reduce: Reduce = "mean",
) -> torch.Tensor:
    """`ir.cache.score.column_mass` by the kernel, float32 [G, S]; q may be of any type, and all of any strides."""
    groups, stored = k.shape[:2]
    if not stored or not q.shape[1]:
        return torch.zeros(groups, stored)
    out = torch.empty(q.shape[0], stored)
    length = normalize == "length"
    if q.dtype is not torch.float32 or q.stride(-1) != 1:
        q = q.float().contiguous()
    k = k if k.stride()[1:] == (k.shape[2], 1) else k.contiguous()
    at = (q_positions.contiguous(), k_positions if k_positions.stride(-1) == 1 else k_positions.contiguous())
    sinks = None if sinks is None else sinks.float().contiguous()
    bind(q, k, *at, out, scale, window=window, softcap=softcap, sinks=sinks, length=length)()
    mass = out.view(groups, -1, stored)
    if normalize == "count":
        mass = mass / seen_by(q_positions, k_positions, window).clamp(min=1)[:, None]
    return reduced(mass, reduce)
