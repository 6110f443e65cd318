"""Kernels that treat every row alike: norms, rotary, gated products and row lookups, in C++.

Each works row by row in a fixed order, so that a token's result does not depend on how many others share the step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from ..ir.encoding import Encoding
from ..ir.encoding.expr import k as COLUMN
from ..ir.encoding.expr import n as ROW
from ..ir.ops import EMBEDDING, GATED, LAYER_NORM, RMS_NORM, ROTARY, Op
from ..ir.weight import Weight
from .build import build
from .printers import cpp

Run = Callable[[], Any]

_ROWS = (
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

extern "C" void rotary(const float* x, const int64_t* positions, const float* freq, float* y, int64_t batch,
                       int64_t heads, int64_t tokens, int64_t dim, int64_t sb, int64_t sh, int64_t st, int64_t r,
                       float scale) {
  for (int64_t b = 0; b < batch; b++)
    for (int64_t t = 0; t < tokens; t++) {
      float cosines[1024], sines[1024];
      for (int64_t i = 0; i < r; i++) {
        const float angle = (float)positions[b * tokens + t] * freq[i];
        cosines[i] = std::cos(angle) * scale;
        sines[i] = std::sin(angle) * scale;
      }
      for (int64_t h = 0; h < heads; h++) {
        const float* in = x + b * sb + h * sh + t * st;
        float* out = y + ((b * heads + h) * tokens + t) * dim;
        for (int64_t i = 0; i < r; i++) {
          out[i] = in[i] * cosines[i] - in[i + r] * sines[i];
          out[i + r] = in[i + r] * cosines[i] + in[i] * sines[i];
        }
        for (int64_t i = 2 * r; i < dim; i++) out[i] = in[i];
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
_WIDEST_ROTARY = 1024


@dataclass(frozen=True)
class RowKernel:
    """A kernel of this file: `bind` fixes every address and returns a call without arguments."""

    name: str
    source: str
    binder: Callable[[ctypes.CDLL, Mapping[str, Any], torch.Tensor], Run]

    def bind(self, args: Mapping[str, Any], out: torch.Tensor) -> Run:
        """`args` by the op's argument names, tensors float32 with the strides they will have; `out` contiguous."""
        return self.binder(build(self.source, self.name), args, out)


def row_kernel(op: Op, weight: Weight | None) -> RowKernel | str:
    """The kernel of a row-wise op, or why there is none. `weight`: the table of an embedding."""
    if op is EMBEDDING:
        return _gather(weight)
    binder = {RMS_NORM: _rms_norm, LAYER_NORM: _layer_norm, ROTARY: _rotary, GATED: _gated}.get(op)
    return f"no C++ template for {op.name}" if binder is None else RowKernel(f"rows.{op.name}", _ROWS, binder)


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """A tensor's address for ctypes; None is a null pointer."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def call(function: Any, *args: Any) -> Run:
    """A call with fixed arguments: ints as int64, floats as float, tensors by address; they are kept alive."""
    function.restype = None
    fixed = [
        pointer(a)
        if a is None or isinstance(a, torch.Tensor)
        else ctypes.c_float(a)
        if isinstance(a, float)
        else ctypes.c_int64(a)
        for a in args
    ]
    run = partial(function, *fixed)
    run.keeps = args  # type: ignore[attr-defined]  # the addresses are only valid while the tensors live
    return run


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
    b, h, t, d = x.shape
    if freq.shape[0] > _WIDEST_ROTARY:
        raise ValueError(f"rotary of {freq.shape[0]} frequencies is wider than {_WIDEST_ROTARY}")
    strides = x.stride()[:3]
    return call(
        library.rotary, x, args["positions"], freq, out, b, h, t, d, *strides, freq.shape[0], float(args["scale"])
    )


def _gated(library: ctypes.CDLL, args: Mapping[str, Any], out: torch.Tensor) -> Run:
    gate, up = args["gate"], args["up"]
    m, k = _rows_of(gate)
    function = getattr(library, f"gated_{args['act']}")
    return call(function, gate, up, out, m, k, row_stride(gate), row_stride(up))


def row_stride(x: torch.Tensor) -> int:
    """The step from row to row of a tensor whose rows are evenly spaced, or -1."""
    if x.stride(-1) != 1:
        return -1
    step = x.stride(-2) if x.dim() > 1 else x.shape[-1]
    for i in range(x.dim() - 3, -1, -1):
        if x.shape[i] > 1 and x.stride(i) != x.stride(i + 1) * x.shape[i + 1]:
            return -1
    return step


def strided_ok(op: Op, args: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of tensor arguments that the kernel of `op` needs contiguous but are not."""
    free = {ROTARY: ("x",), GATED: ("gate", "up")}.get(op, ())
    bad = []
    for name, value in args.items():
        if not isinstance(value, torch.Tensor) or value.is_contiguous():
            continue
        fits = name in free and (value.stride(-1) == 1 if op is ROTARY else row_stride(value) >= 0)
        if not fits:
            bad.append(name)
    return tuple(bad)


def _gather(weight: Weight | None) -> RowKernel | str:
    if weight is None:
        return "the table of the embedding is not a stored weight"
    if len(weight.shape) != 2:
        return f"the table of an embedding must be two-dimensional, not {weight.shape}"
    source = gather_source(weight.encoding, weight.shape[1])
    return RowKernel(f"gather.{weight.encoding.name}", source, partial(_bind_gather, weight))


def _bind_gather(weight: Weight, library: ctypes.CDLL, args: Mapping[str, Any], out: torch.Tensor) -> Run:
    ids = args["ids"]
    parts = [weight.parts[name].contiguous() for name in sorted(weight.parts)]
    return call(library.gather, ids, out, ids.numel(), *parts)


@cache
def gather_source(encoding: Encoding, width: int) -> str:
    """`y[m, :] = W[ids[m], :]` with the encoding's expression spliced in; parts are passed in name order."""
    expr = encoding.expr((ROW + 1, width))
    dtypes = part_dtypes(expr)
    names = {part: f"p_{part}" for part in dtypes}
    params = "".join(f", const {cpp.CTYPES[dtypes[p]]}* p_{p}" for p in sorted(dtypes))
    value = cpp.scalar(expr, names)
    return (
        cpp.PRELUDE
        + f"""
extern "C" void gather(const int64_t* ids, float* y, int64_t m{params}) {{
  for (int64_t r = 0; r < m; r++) {{
    const int64_t {ROW.name} = ids[r];
    for (int64_t {COLUMN.name} = 0; {COLUMN.name} < {width}; {COLUMN.name}++) y[r * {width} + {COLUMN.name}] = {value};
  }}
}}
"""
    )


def part_dtypes(expr: Any) -> dict[str, str]:
    """The storage type of each part that an expression loads."""
    from ..ir.encoding.expr import loads

    return {load.part: load.dtype for load in loads(expr)}
