"""The fast Walsh-Hadamard transform of rows, in C++: log2(size) rounds of sums and differences, in float32."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from .unit import Call, Function, call

# Blocks shorter than a vector share one: distances below 16 are crossed inside of vectors, the others between them.
TEXT = """\
template <int W> static inline f32x16 crossed(f32x16 v) {  // sums in lanes without bit W, differences in others
  f32x16 sign;
  for (int i = 0; i < 16; i++) sign[i] = i & W ? -1.0f : 1.0f;
  return fma(v, sign, CROSSED(v, W));
}

// x, y, numbers in all, size of a block, factor
static void $name(Rank& rank, const int64_t* c) {
  const int64_t total = c[3], size = c[4], unit = size < 16 ? 16 : size;
  const float factor = real(c[5]);
  share(rank, (total + unit - 1) / unit, [&](int64_t u) {
    const float* x = (const float*)c[1] + u * unit;
    float* y = (float*)c[2] + u * unit;
    const int64_t count = total - u * unit < unit ? total - u * unit : unit;
    for (int64_t i = 0; i < count; i += 16) {
      f32x16 v = read(x + i, count - i);
      if (size > 1) v = crossed<1>(v);
      if (size > 2) v = crossed<2>(v);
      if (size > 4) v = crossed<4>(v);
      if (size > 8) v = crossed<8>(v);
      write(y + i, v * factor, count - i);
    }
    for (int64_t h = 16; h < size; h *= 2)
      for (int64_t i = 0; i < size; i += 2 * h)
        for (int64_t j = i; j < i + h; j += 16) {
          const f32x16 a = load<f32x16>(y + j), b = load<f32x16>(y + j + h);
          store(y + j, a + b);
          store(y + j + h, a - b);
        }
  });
}
"""


def bind(args: Mapping[str, Any], out: torch.Tensor, needs: tuple[str, ...]) -> Call:
    """A call of `smelt::hadamard`; `needs` are the texts of `rows_source`."""
    x, size = args["x"], int(args["size"])
    words = (x, out, x.numel(), size, 1 / math.sqrt(size))
    return call(Function.of("rows.hadamard", TEXT, needs), *words, writes=[out], work=size.bit_length() * x.numel())
