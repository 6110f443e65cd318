"""The C++ that walks a sparse matrix by its bits, see ir/encoding/bitmap.py: sixteen rows, four columns at a time."""

from __future__ import annotations

from ..ir.encoding.bitmap import Bitmap


def parts(encoding: Bitmap) -> dict[str, str]:
    """What the walk reads and how it is stored, in the order of its arguments."""
    return {"mask": "int16", "start": "int64", "value": encoding.dtype}


def struct(encoding: Bitmap) -> str:
    """The type of the walk."""
    return f"Expand<{'true' if encoding.dtype == 'bfloat16' else 'false'}>"


TEXT = r"""
#ifndef SMELT_EXPAND
#define SMELT_EXPAND
namespace {
template <bool BFLOAT> struct Expand {
  const int16_t* mask;
  const uint16_t* value;

  Expand(const int16_t* mask, const int64_t* start, const uint16_t* value, int64_t tile, int64_t columns)
      : mask(mask + tile * columns), value(value + start[tile]) {}

  inline void next(f32x16 (&v)[4]) {
    for (int i = 0; i < 4; i++) {
      const uint16_t here = (uint16_t)mask[i];
#if defined(__AVX512VBMI2__) && defined(__AVX512VL__)
      __m256i held = _mm256_loadu_si256((const __m256i*)value);
      asm("" : "+v"(held));  // an expansion from memory is many times slower than a load and one from a register
      const u16x16 h = (u16x16)_mm256_maskz_expand_epi16(here, held);
      value += __builtin_popcount(here);
#else
      u16x16 h = {};
      for (int lane = 0; lane < 16; lane++)
        if (here >> lane & 1) h[lane] = *value++;
#endif
      v[i] = BFLOAT ? bf16_to_f32(h) : f16_to_f32(h);
    }
    mask += 4;
  }
};
}  // namespace
#endif
"""
