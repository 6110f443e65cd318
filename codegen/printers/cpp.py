"""Tile expressions as C++: one element at a time, or sixteen in the vector extensions that GCC and Clang share.

No intrinsics: a 64-byte vector compiles to AVX-512, to two AVX2 registers, to four NEON ones. A kernel's source is
`PRELUDE` followed by code that contains expressions printed here.
"""

from __future__ import annotations

from collections.abc import Mapping

import sympy

from ...ir.encoding.expr import Bin, Cast, Const, Expr, Index, Load
from ..ranges import Ranges, across, fold
from .index import text

LANES = 16
OPERATORS = {"add": "+", "sub": "-", "mul": "*", "and": "&", "shr": ">>"}
# how a part is declared; both half precisions travel as their bits
CTYPES = {
    "float32": "float", "float16": "uint16_t", "bfloat16": "uint16_t",
    "int32": "int32_t", "int16": "int16_t", "int8": "int8_t", "uint8": "uint8_t",
}  # fmt: skip
VECTORS = {
    "float32": "f32x16", "float16": "u16x16", "bfloat16": "u16x16",
    "int32": "i32x16", "int16": "i16x16", "int8": "i8x16", "uint8": "u8x16",
}  # fmt: skip

PRELUDE = """\
#include <cstdint>
#include <cstring>

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int16_t i16x16 __attribute__((vector_size(32)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));

template <class V, class T> static inline V load(const T* p) {  // 16 neighbours, at any alignment
  V v;
  static_assert(sizeof(v) == 16 * sizeof(T), "a vector has 16 lanes");
  memcpy(&v, p, sizeof v);
  return v;
}
static inline void store(float* p, f32x16 v) { memcpy(p, &v, sizeof v); }
static inline f32x16 splat(float x) { return x - f32x16{}; }  // x - 0 keeps the sign of x = -0
// a * b + c in one rounding wherever the machine can. GCC fuses this form by -ffp-contract=fast, alike in every copy of
// a kernel; Clang was seen to fuse it in one copy and not in the next, and is told to.
#if defined(__clang__) && (defined(__FMA__) || defined(__aarch64__)) && __has_builtin(__builtin_elementwise_fma)
static inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return __builtin_elementwise_fma(a, b, c); }
#else
static inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return a * b + c; }
#endif
static inline float sum(f32x16 v) {  // pairwise, always in the same order
  float s[16];
  memcpy(s, &v, sizeof v);
  for (int w = 8; w; w /= 2)
    for (int i = 0; i < w; i++) s[i] += s[i + w];
  return s[0];
}

// GCC 12 widens bytes to words lane by lane, 83 instructions. On AVX-512 a broadcast and a shuffle inside 16-byte
// quarters take 3, elsewhere going through 16 bits takes 6.
#if defined(__clang__)
static inline i32x16 widen(u8x16 v) { return __builtin_convertvector(v, i32x16); }
static inline i32x16 widen(i8x16 v) { return __builtin_convertvector(v, i32x16); }
#elif defined(__AVX512BW__)
template <class V> static inline i32x16 spread(V v) {  // each byte to all four bytes of its lane
  typedef __int128 i128x4 __attribute__((vector_size(64)));
  typedef uint8_t u8x64 __attribute__((vector_size(64)));
  __int128 x;
  memcpy(&x, &v, sizeof x);
  const u8x64 lanes = {0,  0,  0,  0,  1,  1,  1,  1,  2,  2,  2,  2,  3,  3,  3,  3,   // quarter 0, byte 0..3
                       20, 20, 20, 20, 21, 21, 21, 21, 22, 22, 22, 22, 23, 23, 23, 23,  // quarter 1, byte 4..7
                       40, 40, 40, 40, 41, 41, 41, 41, 42, 42, 42, 42, 43, 43, 43, 43,
                       60, 60, 60, 60, 61, 61, 61, 61, 62, 62, 62, 62, 63, 63, 63, 63};
  return (i32x16)__builtin_shuffle((u8x64)(i128x4){x, x, x, x}, lanes);
}
static inline i32x16 widen(u8x16 v) { return spread(v) & 255; }
static inline i32x16 widen(i8x16 v) { return spread(v) >> 24; }
#else
static inline i32x16 widen(u8x16 v) { return __builtin_convertvector(__builtin_convertvector(v, u16x16), i32x16); }
static inline i32x16 widen(i8x16 v) { return __builtin_convertvector(__builtin_convertvector(v, i16x16), i32x16); }
#endif

static inline float bf16_to_f32(uint16_t h) {
  uint32_t bits = (uint32_t)h << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
static inline f32x16 bf16_to_f32(u16x16 h) { return (f32x16)(__builtin_convertvector(h, u32x16) << 16); }

#ifdef __FLT16_MAX__
static inline float f16_to_f32(uint16_t h) {
  _Float16 x;
  memcpy(&x, &h, sizeof x);
  return (float)x;
}
#else
static inline float f16_to_f32(uint16_t h) {
  uint32_t em = h & 0x7fffu, bits = em << 13;
  float x;
  memcpy(&x, &bits, sizeof x);
  x *= 0x1p112f;
  memcpy(&bits, &x, sizeof x);
  bits |= (em > 0x7bffu ? 0x7f800000u : 0u) | (uint32_t)(h & 0x8000u) << 16;
  memcpy(&x, &bits, sizeof x);
  return x;
}
#endif
#if defined(__clang__) && defined(__FLT16_MAX__)
static inline f32x16 f16_to_f32(u16x16 h) {
  typedef _Float16 f16x16 __attribute__((vector_size(32)));
  return __builtin_convertvector((f16x16)h, f32x16);
}
#else
// GCC 12 converts _Float16 vectors lane by lane. Shift exponent and mantissa into place, let a product by 2^112 correct
// the bias (exact, subnormals included), then restore infinities, NaN and the sign.
static inline f32x16 f16_to_f32(u16x16 h) {
  u32x16 w = __builtin_convertvector(h, u32x16), em = w & 0x7fffu;
  f32x16 x = (f32x16)(em << 13) * 0x1p112f;
  u32x16 special = (u32x16)(em > 0x7bffu) & 0x7f800000u;
  return (f32x16)((u32x16)x | special | (w & 0x8000u) << 16);
}
#endif
"""


def index(e: sympy.Expr) -> str:
    """A nonnegative integer expression in C++ (int64_t where its symbols are)."""
    return text(e, "/")


def scalar(expr: Expr, names: Mapping[str, str] | None = None) -> str:
    """One element; `names` maps a part to its pointer in the kernel (its own name when left out)."""
    match expr:
        case Load(part, at, _):
            return f"{(names or {}).get(part, part)}[{index(at)}]"
        case Const(value, dtype):
            return _literal(value, dtype)
        case Index(value):
            return f"(int32_t)({index(value)})"
        case Bin(op, a, b):
            return f"({scalar(a, names)} {OPERATORS[op]} {scalar(b, names)})"
        case Cast(to, a):
            return _cast_scalar(to, a.dtype, scalar(a, names))


def vector(expr: Expr, lane: sympy.Symbol, ranges: Ranges, names: Mapping[str, str] | None = None) -> str:
    """Sixteen elements, `lane` = 0..15, as a vector; what does not vary over the lanes is computed once and spread."""
    value, varies = _vector(expr, lane, {**ranges, lane: (0, LANES - 1)}, names or {})
    if varies:
        return value
    return f"splat({value})" if expr.dtype == "float32" else f"({value} - {VECTORS[expr.dtype]}{{}})"


def _vector(expr: Expr, lane: sympy.Symbol, ranges: Ranges, names: Mapping[str, str]) -> tuple[str, bool]:
    """The text, and whether it is a vector or a scalar that holds for every lane."""
    match expr:
        case Load(part, at, dtype):
            name, at = names.get(part, part), fold(at, ranges)
            match across(at, lane):
                case "uniform":
                    return f"{name}[{index(at)}]", False
                case "contiguous":
                    return f"load<{VECTORS[dtype]}>({name} + {index(at - lane)})", True
            each = (f"{name}[{index(fold(at.subs(lane, i), ranges))}]" for i in range(LANES))
            return f"{VECTORS[dtype]}{{{', '.join(each)}}}", True
        case Index(value):
            value = fold(value, ranges)
            if across(value, lane) == "uniform":
                return f"(int32_t)({index(value)})", False
            each = (f"(int32_t)({index(fold(value.subs(lane, i), ranges))})" for i in range(LANES))
            return f"i32x16{{{', '.join(each)}}}", True
        case Const(number, dtype):
            return _literal(number, dtype), False
        case Bin(op, a, b):
            (left, left_varies), (right, right_varies) = (_vector(side, lane, ranges, names) for side in (a, b))
            return f"({left} {OPERATORS[op]} {right})", left_varies or right_varies
        case Cast(to, a):
            operand, varies = _vector(a, lane, ranges, names)
            return (_cast_vector if varies else _cast_scalar)(to, a.dtype, operand), varies


def _literal(value: float, dtype: str) -> str:
    if dtype != "float32":
        return str(int(value))
    return f"{float(value)!r}f"


def _cast_scalar(to: str, source: str, value: str) -> str:
    if source in ("float16", "bfloat16"):
        return _half(to, source, value)
    return value if to == source else f"({CTYPES[to]}){value}"


def _cast_vector(to: str, source: str, value: str) -> str:
    if source in ("float16", "bfloat16"):
        return _half(to, source, value)
    if source in ("uint8", "int8"):
        value, source = f"widen({value})", "int32"
    return value if to == source else f"__builtin_convertvector({value}, {VECTORS[to]})"


def _half(to: str, source: str, value: str) -> str:
    if to != "float32":
        raise NotImplementedError(f"{source} converts to float32 only, not {to}")
    return f"{'f16' if source == 'float16' else 'bf16'}_to_f32({value})"
