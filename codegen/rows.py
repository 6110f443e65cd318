"""Kernels that treat every row alike: norms, rotary and gated products, in C++.

Each works row by row in a fixed order, so that a token's result does not depend on how many others share the step.
All numbers are float32, positions int64.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch

from ..ir.errors import SmeltError
from ..ir.ops import GATED, LAYER_NORM, RMS_NORM, ROTARY, Op
from .build import build
from .plan import Run
from .printers import cpp

_SOURCE = (
    cpp.PRELUDE
    + """
#include <cmath>

extern "C" void rms_norm(const float* x, const float* w, float* y, int64_t m, int64_t k, float eps, float offset) {
  for (int64_t r = 0; r < m; r++, x += k, y += k) {
    f32x16 acc = {};
    int64_t c = 0;
    for (; c + 16 <= k; c += 16) { f32x16 v = load<f32x16>(x + c); acc += v * v; }
    float total = sum(acc);
    for (int64_t t = c; t < k; t++) total += x[t] * x[t];
    const float s = 1.0f / std::sqrt(total / (float)k + eps);
    for (int64_t i = 0; i < k; i++) y[i] = x[i] * s * (w[i] + offset);
  }
}

extern "C" void layer_norm(const float* x, const float* w, const float* b, float* y, int64_t m, int64_t k, float eps) {
  for (int64_t r = 0; r < m; r++, x += k, y += k) {
    f32x16 acc = {};
    int64_t c = 0;
    for (; c + 16 <= k; c += 16) acc += load<f32x16>(x + c);
    float total = sum(acc);
    for (int64_t t = c; t < k; t++) total += x[t];
    const float mean = total / (float)k;
    f32x16 square = {};
    for (c = 0; c + 16 <= k; c += 16) { f32x16 v = load<f32x16>(x + c) - mean; square += v * v; }
    float variance = sum(square);
    for (int64_t t = c; t < k; t++) variance += (x[t] - mean) * (x[t] - mean);
    const float s = 1.0f / std::sqrt(variance / (float)k + eps);
    for (int64_t i = 0; i < k; i++) y[i] = (x[i] - mean) * s * w[i] + (b ? b[i] : 0.0f);
  }
}

// sp, sb, sh, st: steps between rows of positions, and between batches, heads and tokens of x
extern "C" void rotary(const float* x, const int64_t* positions, const float* freq, float* y, int64_t batch,
                       int64_t heads, int64_t tokens, int64_t dim, int64_t sp, int64_t sb, int64_t sh, int64_t st,
                       int64_t r, float scale) {
  constexpr int64_t BLOCK = 256;
  float cosines[BLOCK], sines[BLOCK];
  for (int64_t b = 0; b < batch; b++)
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t first = 0; first < r; first += BLOCK) {
        const int64_t count = r - first < BLOCK ? r - first : BLOCK;
        for (int64_t i = 0; i < count; i++) {
          const float angle = (float)positions[b * sp + t] * freq[first + i];
          cosines[i] = std::cos(angle) * scale;
          sines[i] = std::sin(angle) * scale;
        }
        for (int64_t h = 0; h < heads; h++) {
          const float* in = x + b * sb + h * sh + t * st + first;
          float* out = y + ((b * heads + h) * tokens + t) * dim + first;
          for (int64_t i = 0; i < count; i++) {
            out[i] = in[i] * cosines[i] - in[i + r] * sines[i];
            out[i + r] = in[i + r] * cosines[i] + in[i] * sines[i];
          }
          if (first + count == r)  // what stands behind the rotated dims is passed on
            for (int64_t i = r + count; first + i < dim; i++) out[i] = in[i];
        }
      }
}

static inline float silu(float x) { return x / (1.0f + std::exp(-x)); }
static inline float relu(float x) { return x > 0.0f ? x : 0.0f; }
static inline float gelu(float x) { return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f)); }
static inline float gelu_tanh(float x) {
  return 0.5f * x * (1.0f + std::tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
}
#define GATED(act)                                                                                          \\
  extern "C" void gated_##act(const float* gate, const float* up, float* y, int64_t m, int64_t k, int64_t sg, \\
                              int64_t su) {                                                                  \\
    for (int64_t r = 0; r < m; r++)                                                                          \\
      for (int64_t i = 0; i < k; i++) y[r * k + i] = act(gate[r * sg + i]) * up[r * su + i];                 \\
  }
GATED(silu) GATED(relu) GATED(gelu) GATED(gelu_tanh)
"""
)

Binder: TypeAlias = Callable[[ctypes.CDLL, Mapping[str, Any], torch.Tensor], Run]


@dataclass(frozen=True)
class RowKernel:
    """A row-wise kernel; `bind` builds it (or finds it built) and fixes every address."""

    name: str
    source: str
    binder: Binder
    strided: tuple[str, ...] = ()  # arguments that need not be contiguous

    def bind(self, args: Mapping[str, Any], out: torch.Tensor) -> Run:
        """A call that writes `out`; tensors of `args` have the addresses and strides that they will have then.

        Raises SmeltError for a tensor of another type, or of strides that the kernel does not take.
        """
        if copied := self.contiguous(args):
            raise SmeltError(f"{self.name}: '{copied[0]}' has strides {args[copied[0]].stride()}; bind a contiguous copy")
        for name, value in (*args.items(), ("out", out)):
            wanted = torch.int64 if name in ("ids", "positions") else torch.float32
            if isinstance(value, torch.Tensor) and value.dtype is not wanted:
                raise SmeltError(f"{self.name}: '{name}' is {value.dtype}, the kernel takes {wanted}")
        return self.binder(build(self.source, self.name), args, out)

    def contiguous(self, args: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of tensor arguments that must be copied to be contiguous first."""
        tensors = {name: value for name, value in args.items() if isinstance(value, torch.Tensor)}
        bad = [n for n, v in tensors.items() if not v.is_contiguous() and (n not in self.strided or _irregular(n, v))]
        return tuple(bad)


def row_kernel(op: Op) -> RowKernel | str:
    """The kernel of a row-wise op, or why there is none."""
    if op not in _KERNELS:
        return f"no C++ template for {op.name}"
    binder, strided = _KERNELS[op]
    return RowKernel(f"rows.{op.name}", _SOURCE, binder, strided)


def call(function: Any, *args: Any) -> Run:
    """A call with fixed arguments: ints as int64, floats as float, tensors by address (None: null); all kept alive."""
    function.restype = None
    run = partial(function, *fixed(args))
    run.keeps = args  # type: ignore[attr-defined]  # the addresses are only valid while the tensors live
    return run


def fixed(args: tuple[Any, ...]) -> list[Any]:
    """Arguments as ctypes values."""
    return [
        ctypes.c_void_p(a if a is None else a.data_ptr())
        if a is None or isinstance(a, torch.Tensor)
        else ctypes.c_float(a)
        if isinstance(a, float)
        else ctypes.c_int64(a)
        for a in args
    ]


def row_stride(x: torch.Tensor) -> int:
    """The step from row to row of a tensor whose rows are evenly spaced, or -1."""
    if x.stride(-1) != 1:
        return -1
    # dims of one row say nothing: torch may give them any stride
    dims = [(size, step) for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    even = all(outer == size * step for (_, outer), (size, step) in zip(dims, dims[1:], strict=False))
    return (dims[-1][1] if dims else x.shape[-1]) if even else -1


def _irregular(name: str, value: torch.Tensor) -> bool:
    """Whether a strided argument has strides that its kernel does not take."""
    return value.stride(-1) != 1 if name in ("x", "positions") else row_stride(value) < 0


def _rows_of(x: torch.Tensor) -> tuple[int, int]:
    return x.numel() // x.shape[-1], x.shape[-1]


def _rms_norm(library: ctypes.CDLL, args: Mapping[str, Any], out: torch.Tensor) -> Run:
    x = args["x"]
    return call(library.rms_norm, x, args["weight"], out, *_rows_of(x), float(args["eps"]), float(args["offset"]))


def _layer_norm(library: ctypes.CDLL, args: Mapping[str, Any], out: torch.Tensor) -> Run:
    x = args["x"]
    return call(library.layer_norm, x, args["weight"], args["bias"], out, *_rows_of(x), float(args["eps"]))


def _rotary(library: ctypes.CDLL, args: Mapping[str, Any], out: torch.Tensor) -> Run:
    x, freq = args["x"], args["inv_freq"]
    (b, h, t, d), steps = x.shape, x.stride()[:3]
    positions = args["positions"].expand(b, t)
    sizes = (b, h, t, d, positions.stride(0), *steps, freq.shape[0])
    return call(library.rotary, x, positions, freq, out, *sizes, float(args["scale"]))


def _gated(library: ctypes.CDLL, args: Mapping[str, Any], out: torch.Tensor) -> Run:
    gate, up = args["gate"], args["up"]
    if gate.shape != up.shape:
        raise SmeltError(f"rows.gated: gate {list(gate.shape)} and up {list(up.shape)} must have one shape")
    function = getattr(library, f"gated_{args['act']}")
    return call(function, gate, up, out, *_rows_of(gate), row_stride(gate), row_stride(up))


_KERNELS: dict[Op, tuple[Binder, tuple[str, ...]]] = {
    RMS_NORM: (_rms_norm, ()),
    LAYER_NORM: (_layer_norm, ()),
    ROTARY: (_rotary, ("x", "positions")),
    GATED: (_gated, ("gate", "up")),
}
