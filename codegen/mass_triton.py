"""How much attention dense keys get, on a GPU, in Triton: column sums for scores, or a mass per query for running ones.

The reference is `column_mass` and `query_mass` of `ir/cache/score.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import Any, TypeAlias

import torch

from ..ir.cache.score import Normalize, Reduce, reduced, seen_by
from ..ir.errors import SmeltError
from .mass_triton_template import KERNELS
from .triton_module import load

Launch: TypeAlias = Callable[[], Any]

MOST_SPLITS = 32  # of the keys of one row block
PROGRAMS = 256  # of `sums`, about two on each multiprocessor: fewer row blocks are made up for by splits
OPTIONS = {"num_warps": 4, "num_stages": 2}
REDUCE = {"mean": 1, "max": 2, "sum": 3}
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


def covers(dtype: torch.dtype, dim: int) -> str | None:
    """Why there is no kernel for keys of a type and width, or None."""
    if dtype not in POINTERS:
        return f"keys are float32, float16 or bfloat16, not {dtype}"
    return "keys wider than 256 leave a tile no room" if dim > 256 else None


def shape(heads: int, groups: int, dim: int, dtype: torch.dtype, queries: int) -> dict[str, int]:
    """Sizes of tiles, constants of both kernels: 16 or 32 rows, 64 keys of up to 256 bytes or 32 wider ones."""
    group = heads // groups
    padded, dim_padded = _power(group), max(16, _power(dim))
    rows = max(padded, 16 if queries * padded <= 16 else 32)
    keys = 64 if dim_padded * dtype.itemsize <= 256 else 32
    return {
        "G": groups,
        "R": group,
        "RP": padded,
        "D": dim,
        "DP": dim_padded,
        "M": rows,
        "BS": keys,
        "WHOLE": dtype.itemsize == 2,
    }


def splits(queries: int, sizes: dict[str, int], width: int) -> tuple[int, int]:
    """Into how many parts the keys of a row block are cut, a power of two, and how many keys each has."""
    programs = sizes["G"] * -(-queries * sizes["RP"] // sizes["M"])
    many = max(1, min(MOST_SPLITS, _power(PROGRAMS // programs), _power(-(-width // sizes["BS"]))))
    return many, -(-width // (many * sizes["BS"])) * sizes["BS"]


def launches(
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
    used: torch.Tensor | None = None,
    stats: torch.Tensor | None = None,
) -> tuple[Launch, Launch]:
    """What sets `out` to the mass of keys [G, S, D] from queries q [H, n, D], as `codegen.mass.bind` says.

    q is float32 or of the keys' type. `used`: an integer on the device, how many of the S keys there are, so that a
    captured graph serves a buffer that fills; what lies behind is neither read nor written. `stats`: scratch of
    `scratch(...)` floats.
    """
    heads, new, dim = q.shape
    groups, width, _ = keys.shape
    if heads % groups:
        raise SmeltError(f"mass: {heads} query heads do not share {groups} KV heads evenly")
    if why := covers(keys.dtype, dim):
        raise SmeltError(f"mass: {why}; decode them")
    wanted = (new, groups, width) if each else (heads, width)
    good = keys.shape[2] == dim and q.stride(-1) == 1 and keys.stride()[1:] == (dim, 1)
    good = good and out.shape == wanted and out.is_contiguous() and out.dtype is torch.float32
    good = good and k_positions.shape in ((1, width), (groups, width)) and q_positions.shape == (new,)
    if not good:
        raise ValueError(
            f"mass: needed are q [H, n, D], keys [G, S, D], positions [n] and [G or 1, S], and out {list(wanted)}, "
            f"each contiguous in its last dims, not {list(q.shape)}, {list(keys.shape)}, {list(q_positions.shape)}, "
            f"{list(k_positions.shape)} and {list(out.shape)}"
        )
    sizes = shape(heads, groups, dim, keys.dtype, new)
    many, span = splits(new, sizes, width)
    blocks = -(-new * sizes["RP"] // sizes["M"])
    stats = q.new_empty(scratch(q, keys), dtype=torch.float32) if stats is None else stats
    k_at_head = k_positions.stride(0) if len(k_positions) > 1 else 0
    flags = {"SOFTCAP": softcap is not None, "WINDOW": window is not None, "VISIBLE": visible is not None}
    flags |= {"USED": used is not None}
    at = (q, keys, q_positions, k_positions, visible, used, stats)
    numbers = (new, width, *q.stride()[:2], keys.stride(0), k_at_head, fresh, window or 0)
    factors = (float(scale), float(softcap or 0.0))
    kernels = module()
    first = partial(kernels.sums[(groups * blocks, many)], *at, *numbers, span, *factors, **sizes, **flags, **OPTIONS)
    grid = (groups, -(-width // sizes["BS"]), blocks if each else 1)
    flags |= {"SINKS": sinks is not None, "LENGTH": length}
    reduce = REDUCE[each] if each else 0
    more = {"SPLITS": many, "EACH": reduce}
    second = partial(kernels.columns[grid], *at, sinks, out, *numbers, *factors, **sizes, **flags, **more, **OPTIONS)
    return first, second


def scratch(q: torch.Tensor, keys: torch.Tensor) -> int:
    """Floats that a call on such tensors needs."""
    sizes = shape(q.shape[0], keys.shape[0], q.shape[2], keys.dtype, q.shape[1])
    many = splits(q.shape[1], sizes, keys.shape[1])[0]
    return 3 * many * sizes["G"] * -(-q.shape[1] * sizes["RP"] // sizes["M"]) * sizes["M"]


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
    """`ir.cache.score.column_mass` by the kernels, float32 [G, S]."""
    groups, stored = k.shape[:2]
    if not stored or not q.shape[1]:
        return q.new_zeros(groups, stored, dtype=torch.float32)
    out = q.new_empty(q.shape[0], stored, dtype=torch.float32)
    length = normalize == "length"
    q, k = q if q.stride(-1) == 1 else q.contiguous(), k if k.stride()[1:] == (k.shape[2], 1) else k.contiguous()
    q_positions = q_positions.contiguous()
    k_positions = k_positions if k_positions.stride(-1) == 1 else k_positions.contiguous()
    for launch in launches(
        q, k, q_positions, k_positions, out, scale, window=window, softcap=softcap, sinks=sinks, length=length
    ):
        launch()
    mass = out.view(groups, -1, stored)
    if normalize == "count":
        mass = mass / seen_by(q_positions, k_positions, window).clamp(min=1)[:, None]
    return reduced(mass, reduce)


def signatures(dtype: torch.dtype) -> dict[str, dict[str, str]]:
    """Triton's type of every argument of both kernels that is no constant, for compiling ahead of time."""
    at = {"q": "*fp32", "k": POINTERS[dtype], **dict.fromkeys(("q_at", "k_at", "visible", "used_at"), "*i64")}
    names = ("n", "width", "q_head", "q_token", "k_head", "k_at_head", "fresh", "window")
    numbers, factors = dict.fromkeys(names, "i32"), {"scale": "fp32", "softcap": "fp32"}
    return {
        "sums": {**at, "stats": "*fp32", **numbers, "span": "i32", **factors},
        "columns": {**at, "stats": "*fp32", "sinks": "*fp32", "out": "*fp32", **numbers, **factors},
    }


@cache
def module() -> ModuleType:
    """The kernels `sums` and `columns`."""
    return load(KERNELS, "mass")


def _power(n: int) -> int:
    """The lowest power of two from n on."""
    return 1 << max(0, n - 1).bit_length()
