"""How fast this machine reads memory with the threads that kernels run on: the bound of a step that reads weights."""

from __future__ import annotations

import functools
import time

import torch

from .arena import Arena
from .unit import Function, Unit, call

BYTES = 1 << 28  # far beyond the caches of a core's share
PIECE = 1 << 18
_READ = """
// x, pieces, bytes of a piece, y: a number that depends on every byte
static void $name(Rank& rank, const int64_t* c) {
  int64_t total = 0;
  share(rank, c[2], [&](int64_t piece) {
    const char* x = (const char*)c[1] + piece * c[3];
    i32x16 sums[4] = {};
    for (int64_t i = 0; i < c[3]; i += 256)
      for (int j = 0; j < 4; j++) sums[j] += load_words(x + i + 64 * j);
    for (int j = 0; j < 16; j++) total += sums[0][j] + sums[1][j] + sums[2][j] + sums[3][j];
  });
  __atomic_add_fetch((int64_t*)c[4], total, __ATOMIC_RELAXED);
}
"""


@functools.cache
def read_bandwidth(repeats: int = 5) -> float:
    """Bytes a second, the best of some reads of 256 MiB; measured once a process."""
    x, y = Arena().hold(torch.ones(BYTES // 8, dtype=torch.int64)), torch.zeros(1, dtype=torch.int64)
    unit = Unit([call(Function.of("read", _READ), x, BYTES // PIECE, PIECE, y, writes=[y])])
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        unit()
        best = min(best, time.perf_counter() - start)
    return BYTES / best
