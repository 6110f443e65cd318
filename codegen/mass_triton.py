"""How much attention dense keys get, on a GPU, in Triton. The reference is `column_sums` of `ir/cache/score.py`."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch

from ..ir.cache.score import Asked
from ..ir.errors import SmeltError
from .mass_triton_template import KERNELS
from .triton_module import load

MOST_SPLITS = 32  # of the keys of one row block
PROGRAMS = 256  # of `sums`, about two on each multiprocessor: fewer row blocks are made up for by splits
OPTIONS = {"num_warps": 4, "num_stages": 2}
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


def covers(dtype: torch.dtype, dim: int) -> str | None:
    """Why there is no kernel for keys of a type and width, or None."""
    if dtype not in POINTERS:
        return f"keys are float32, float16 or bfloat16, not {dtype}"
    return "keys wider than 256 leave a tile no room" if dim > 256 else None


def shape(heads: int, groups: int, dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Sizes of tiles, constants of both kernels: 32 rows, 64 keys of up to 256 bytes or 32 wider ones."""
    group = heads // groups
    padded, dim_padded = _power(group), max(16, _power(dim))
    keys = 64 if dim_padded * dtype.itemsize <= 256 else 32
    return {
        "G": groups,
        "R": group,
        "RP": padded,
        "D": dim,
        "DP": dim_padded,
        "M": max(padded, 32),
        "BS": keys,
        "WHOLE": dtype.itemsize == 2,
    }


def splits(queries: int, sizes: dict[str, int], width: int) -> tuple[int, int]:
    """Into how many parts the keys of a row block are cut, a power of two, and how many keys each has."""
    programs = sizes["G"] * -(-queries * sizes["RP"] // sizes["M"])
    many = max(1, min(MOST_SPLITS, _power(PROGRAMS // programs), _power(-(-width // sizes["BS"]))))
    return many, -(-width // (many * sizes["BS"])) * sizes["BS"]


def column_sums(asked: Asked) -> torch.Tensor:
    """`ir.cache.score.column_sums` by the kernels, float32 [H, S]; keys of halves take the queries as halves too."""
    (heads, new, dim), (groups, stored, _) = asked.q.shape, asked.k.shape
    if why := covers(asked.k.dtype, dim):
        raise SmeltError(f"mass: {why}; decode them")
    sizes = shape(heads, groups, dim, asked.k.dtype)
    many, span = splits(new, sizes, stored)
    blocks = -(-new * sizes["RP"] // sizes["M"])
    stats, out = (
        asked.q.new_empty(*size, dtype=torch.float32)
        for size in ((3 * many * groups * blocks * sizes["M"],), (heads, stored))
    )
    k_at_head = asked.k_positions.stride(0) if len(asked.k_positions) > 1 else 0
    at = (asked.q, asked.k, asked.q_positions, asked.k_positions, stats)
    numbers = (new, stored, asked.q.stride(0), asked.k.stride(0), k_at_head, asked.window or 0)
    factors = (float(asked.scale), float(asked.softcap or 0.0))
    flags = {"SOFTCAP": asked.softcap is not None, "WINDOW": asked.window is not None}
    module().sums[groups * blocks, many](*at, *numbers, span, *factors, **sizes, **flags, **OPTIONS)
    flags |= {"SINKS": asked.sinks is not None, "LENGTH": asked.length}
    grid = (groups, -(-stored // sizes["BS"]))
    module().columns[grid](*at, asked.sinks, out, *numbers, *factors, **sizes, **flags, SPLITS=many, **OPTIONS)
    return out


def signatures(dtype: torch.dtype) -> dict[str, dict[str, str]]:
    """Triton's type of every argument of both kernels that is no constant, for compiling ahead of time."""
    at = {"q": "*fp32", "k": POINTERS[dtype], "q_at": "*i64", "k_at": "*i64"}
    names = ("n", "stored", "q_head", "k_head", "k_at_head", "window")
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
