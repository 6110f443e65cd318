"""The C++ that reads weights in order, sixteen rows by four columns at a time: a value has no place of its own."""

from __future__ import annotations

from ..ir.encoding import Encoding
from ..ir.encoding.bitmap import Bitmap
from ..ir.encoding.tiered import Tiered
from . import expand

COLUMNS = 4  # that a step reads
# the parts that a walk reads, in the order of its arguments
_TIERED = {"low": "uint8", "first": "uint8", "second": "uint8", "rest": "uint8", "start": "int64", "table": "uint8"}


def walked(encoding: Encoding) -> dict[str, str] | None:
    """The parts of an encoding that is walked and how each is stored; None where values are found by their places."""
    if isinstance(encoding, Bitmap):
        return expand.parts(encoding)
    return _TIERED if isinstance(encoding, Tiered) else None


def struct(encoding: Encoding) -> str:
    """The C++ type of the walk."""
    return expand.struct(encoding) if isinstance(encoding, Bitmap) else "Walk"


def text(encoding: Encoding) -> str:
    """The C++ that declares it."""
    return expand.TEXT if isinstance(encoding, Bitmap) else TEXT


# With AVX-512 a block is some 50 instructions and no branch: a shuffle and `vpmultishiftqb` make bytes of codes, and
# `vpexpandb` spreads the next of a list over the elements that it belongs to.
TEXT = r"""
#ifndef SMELT_WALK
#define SMELT_WALK
namespace {
struct Walk {  // the weights of sixteen rows, see ir/encoding/tiered.py
  static constexpr int AHEAD = 3072;  // bytes
  const uint8_t *low, *first, *second, *rest, *table;
  int64_t at;  // in the second tier

  Walk(const uint8_t* low, const uint8_t* first, const uint8_t* second, const uint8_t* rest, const int64_t* start,
       const uint8_t* table, int64_t tile, int64_t columns)
      : low(low + tile * columns * 16), first(first + tile * columns * 4), second(second),
        rest(rest + start[2 * tile + 1]), table(table), at(start[2 * tile]) {}

#if defined(__AVX512VBMI2__) && defined(__AVX512VBMI__) && defined(__AVX512BW__) && defined(__POPCNT__)
  inline void next(f32x16 (&v)[4]) {
    const __m512i three = _mm512_set1_epi8(3), seven = _mm512_set1_epi8(7), top = _mm512_set1_epi8((char)128);
    // two bytes to each eight codes of 2 bits, four to those of 3 bits
    const __m512i pairs = _mm512_set_epi64(0x0f0e, 0x0d0c, 0x0b0a, 0x0908, 0x0706, 0x0504, 0x0302, 0x0100);
    const __m512i fours = _mm512_set_epi64(0x18171615, 0x15141312, 0x1211100f, 0x0f0e0d0c, 0x0c0b0a09, 0x09080706,
                                           0x06050403, 0x03020100);
    const __m512i by2 = _mm512_set1_epi64(0x0e0c0a0806040200), by3 = _mm512_set1_epi64(0x15120f0c09060300);

    __builtin_prefetch(low + AHEAD);
    __builtin_prefetch(first + AHEAD / 4);
    __m512i code = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)first)), pairs);
    __m512i rank = _mm512_and_si512(_mm512_multishift_epi64_epi8(by2, code), three);
    const __mmask64 beyond = _mm512_cmpeq_epi8_mask(rank, three);
    const int64_t bit = 3 * at;
    code = _mm512_permutexvar_epi8(fours, _mm512_loadu_si512(second + (bit >> 3)));
    code = _mm512_multishift_epi64_epi8(_mm512_add_epi8(by3, _mm512_set1_epi8(bit & 7)), code);
    code = _mm512_maskz_expand_epi8(beyond, _mm512_and_si512(code, seven));
    rank = _mm512_add_epi8(rank, code);
    const __mmask64 none = _mm512_cmpeq_epi8_mask(code, seven);
    __m512i symbol = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table)), rank);
    symbol = _mm512_mask_expand_epi8(symbol, none, _mm512_loadu_si512(rest));

    const __m512i byte = _mm512_loadu_si512(low);
    const __m512i upper = _mm512_ternarylogic_epi64(top, byte, symbol, 0xCA);  // top bit of the byte, else the symbol
    const __m512i lower = _mm512_ternarylogic_epi64(top, symbol, byte, 0xCA);
    __m512i place = _mm512_set_epi32(0x7c3c0000, 0x78380000, 0x74340000, 0x70300000, 0x6c2c0000, 0x68280000,
                                     0x64240000, 0x60200000, 0x5c1c0000, 0x58180000, 0x54140000, 0x50100000,
                                     0x4c0c0000, 0x48080000, 0x44040000, 0x40000000);
    for (int i = 0; i < 4; i++) {
      v[i] = (f32x16)_mm512_maskz_permutex2var_epi8(0xccccccccccccccccull, lower, place, upper);
      place = _mm512_add_epi8(place, _mm512_set1_epi32(0x01010000));
    }
    at += __builtin_popcountll(beyond), rest += __builtin_popcountll(none);
    low += 64, first += 16;
  }
#else
  inline void next(f32x16 (&v)[4]) {
    uint32_t words[4][16];
    for (int i = 0; i < 64; i++) {
      const int code = first[i / 4] >> (i % 4 * 2) & 3, beyond = code == 3;
      const uint8_t* two = second + (3 * at >> 3);
      const int rank = code + ((two[0] | two[1] << 8) >> (3 * at & 7) & 7 & -beyond), none = rank == 10;
      const uint8_t symbol = none ? *rest : table[rank];
      const uint32_t upper = (low[i] & 128) | (symbol & 127), lower = (symbol & 128) | (low[i] & 127);
      words[i % 4][i / 4] = upper << 24 | lower << 16;
      at += beyond, rest += none;
    }
    memcpy(&v[0], words, sizeof words);
    low += 64, first += 16;
  }
#endif
};
}  // namespace
#endif
"""
