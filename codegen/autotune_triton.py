"""Tiles of the Triton products as data: what to try for a shape, the default first, and what a choice is kept for.

Nothing is timed unless a caller asks for it and a GPU is there; without that every kernel takes its default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch

Form: TypeAlias = Literal["gemv", "skinny", "large"]
PROCESSORS = 132  # of an H100 SXM; fewer outputs than this leave memory idle
BUCKETS = (1, 2, 4, 16, 32, 64, 256, 1024, 4096)


@dataclass(frozen=True)
class Tile:
    """Rows of x, outputs and logical columns of a tile, warps, stages of the loop, and programs that share the columns.

    Sides are powers of two. group: blocks of x rows that are walked together, so that a block of W stays in the cache.
    """

    block_m: int = 1
    block_n: int = 64
    block_k: int = 256
    warps: int = 4
    stages: int = 1
    splits: int = 1
    group: int = 1


# programs a processor, of 2 kB of weights in flight each, to hide the latency of memory; and the fewest steps of a
# share: tl.dot loads ahead over several steps, a gemv within one
SHARES: dict[Form, tuple[int, int]] = {"gemv": (8, 1), "skinny": (4, 4), "large": (1, 1)}
# by form, for operands of two bytes and of four: float32 products take no tensor cores, and twice the registers
SPACES: dict[tuple[Form, int], tuple[Tile, ...]] = {
    ("gemv", 2): (
        Tile(),
        Tile(stages=3),
        Tile(block_n=32),
        Tile(block_n=16, block_k=256),
        Tile(block_n=32, block_k=256, warps=2),
        Tile(block_n=128),
        Tile(block_n=128, warps=8, stages=3),
        Tile(block_n=32, block_k=512, stages=2),
    ),
    ("gemv", 4): (Tile(), Tile(block_n=32), Tile(block_n=16, block_k=256), Tile(stages=3)),
    ("skinny", 2): (
        Tile(block_n=64, block_k=128, stages=3),
        Tile(block_n=64, block_k=256, stages=3),
        Tile(block_n=64, block_k=64, stages=5),
        Tile(block_n=128, block_k=128, stages=3),
        Tile(block_n=128, block_k=128, warps=8, stages=4),
        Tile(block_n=32, block_k=256, stages=3),
    ),
    ("skinny", 4): (Tile(block_n=32, block_k=32, stages=2), Tile(block_n=64, block_k=32, stages=2)),
    ("large", 2): (
        Tile(128, 128, 64, warps=8, stages=3, group=8),
        Tile(128, 128, 128, warps=8, stages=3, group=8),
        Tile(256, 128, 64, warps=8, stages=3, group=8),
        Tile(128, 64, 64, warps=4, stages=4, group=8),
        Tile(64, 128, 64, warps=4, stages=4, group=8),
        Tile(64, 64, 64, warps=4, stages=4, group=8),
    ),
    ("large", 4): (Tile(64, 64, 32, stages=2, group=8), Tile(32, 64, 32, stages=2, group=8)),
}


def form(m: int) -> Form:
    """The kernel for so many rows of x."""
    return "gemv" if m <= 4 else "skinny" if m <= 64 else "large"


def bucket(m: int) -> int:
    """The rows that share a choice with m: the next of a few sizes."""
    return next((size for size in BUCKETS if m <= size), BUCKETS[-1])


def space(m: int, n: int, k: int, dtype: torch.dtype, sums: int = 1, processors: int = PROCESSORS) -> tuple[Tile, ...]:
    """Tiles for `[m, k] @ [n, k]^T`, the default first; each split so that every processor has work.

    sums: weights that a program multiplies by; for two, large tiles have half the rows: 128 x 64 spills on sm_80.
    """
    kind = form(m)
    tiles = SPACES[kind, 2 if dtype.itemsize <= 2 else 4]
    if kind == "large":
        return tuple(replace(tile, block_m=tile.block_m // sums) for tile in tiles)
    # tl.dot takes 16 rows at least; a gemv has its rows written out
    rows = 1 if kind == "gemv" else max(16, 1 << (m - 1).bit_length())
    return tuple(replace(tile, block_m=rows, splits=splits(kind, n, k, tile, processors)) for tile in tiles)


def splits(kind: Form, n: int, k: int, tile: Tile, processors: int = PROCESSORS) -> int:
    """Programs that share the columns of a block of outputs: a power of two, up to 16, by what SHARES asks for."""
    programs, steps = SHARES[kind]
    wanted = -(-programs * processors // -(-n // tile.block_n))
    most = max(1, min(16, k // (steps * tile.block_k)))
    return 1 << (min(wanted, most).bit_length() - 1)


def key(m: int, n: int, k: int, product: object) -> tuple[int, int, int, str]:
    """What a choice is kept for: the bucket of m, n, k, and the product with its encodings."""
    return bucket(m), n, k, str(product)


def fastest(tiles: Sequence[Tile], run: Any) -> Tile:
    """The tile with which `run(tile)` takes the least time on the GPU; tiles that it has no room for are passed over.

    Without a GPU, the default. Must not be called while a CUDA graph is captured.
    """
    if not torch.cuda.is_available():
        return tiles[0]
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    times = []
    for tile in tiles:
        try:
            times.append(float(do_bench(lambda tile=tile: run(tile), quantiles=[0.5])))
        except OutOfResources:
            times.append(float("inf"))
    return tiles[times.index(min(times))]
