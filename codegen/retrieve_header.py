"""What the C++ kernels that list what a query reads share: their call, scores as integers, and the best of them."""

from __future__ import annotations

LISTS = """\
#ifndef SMELT_LISTS
#define SMELT_LISTS
namespace lists {
typedef int64_t i64;

struct Lookup {
  const float* q;                        // [B, H, T, D] by these strides; D is contiguous
  i64 q_row, q_head, q_token;
  const void* parts[8];                  // of keys by page, then tables by KV head; or least and greatest of channels
  i64 steps[8];                      // numbers of a page, or of a KV head's table
  const int32_t *table, *held, *pages;   // [B, G, P] slots, [B, G] pages in use, [N, 2] tokens and first position
  const int32_t* places;                 // [N, cap] positions, or null
  const float* turns;                    // [positions, 2 R] cos and sin
  const i64* positions;                  // [B, T] of the new tokens
  int32_t *picks, *count;                // [B, T, G, n], [B, T, G]
  float* work;
  i64 rows, tokens, columns, n;      // B, T, P, n
  i64 block, state;                  // new tokens that the scratch serves at once, its floats for one of a row
  float scale, softcap;                  // softcap 0: none
  const float* query(i64 b, i64 h, i64 t) const { return q + b * q_row + h * q_head + t * q_token; }
  int32_t* list(i64 b, i64 t, i64 g, i64 groups) const {
    return picks + ((b * tokens + t) * groups + g) * n;
  }
};

constexpr int32_t NEVER = INT32_MIN;  // the score of what is no entry
static const i32x16 LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// integers in the order of the floats; both zeros are one
static inline i32x16 ordered(f32x16 x) {
  const i32x16 bits = (i32x16)(x + 0.0f);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
static inline i32x16 scores_at(const int32_t* p) { return load_words(p); }
static inline void store_scores(int32_t* p, i32x16 v) { memcpy(p, &v, sizeof v); }
// how many of `many` scores, a multiple of 16, are at least this
static inline i64 at_least(const int32_t* x, i64 many, int32_t least) {
  i32x16 counts[4] = {};
  i64 i = 0;
  for (; i + 64 <= many; i += 64)
    for (int j = 0; j < 4; j++) counts[j] -= scores_at(x + i + 16 * j) >= least;
  for (; i < many; i += 16) counts[0] -= scores_at(x + i) >= least;
  return sum(counts[0] + counts[1] + counts[2] + counts[3]);
}
static inline uint32_t lanes(i32x16 mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#else
  uint32_t bits = 0;
  for (int j = 0; j < 16; j++) bits |= (uint32_t)(mask[j] & 1) << j;
  return bits;
#endif
}
static inline i64 all(i64 first, i64 end, int32_t* out) {
  for (i64 i = first; i < end; i++) out[i - first] = i;
  return end - first;
}
// The places of the `most` greatest of more than `most` scores, ascending; of equal ones the first. x is readable, and
// NEVER, up to a whole vector.
static i64 best(const int32_t* x, i64 many, i64 most, int32_t* out) {
  const i64 padded = (many + 15) / 16 * 16;
  i32x16 high = LANE - LANE + NEVER;
  for (i64 i = 0; i < padded; i += 16) {
    const i32x16 v = scores_at(x + i), more = v > high;
    high = (v & more) | (high & ~more);
  }
  i64 low = NEVER + 1ll, above = NEVER, taken = 0;  // at least `most` scores reach `low`; `taken`, fewer, reach `above`
  for (int j = 0; j < 16; j++) above = high[j] > above ? high[j] : above;
  above++;
  while (above - low > 1) {
    const i64 middle = low + (above - low) / 2, reach = at_least(x, padded, middle);
    if (reach >= most) low = middle;
    else above = middle, taken = reach;
    if (reach == most) break;
  }
  const int32_t least = low;
  i64 end = padded;  // the places of scores that equal the least taken end here
  if (at_least(x, padded, least) > most)
    for (end = 0, taken = most - taken; taken; end++) taken -= x[end] == least;
  i64 found = 0;
  for (i64 i = 0; i < padded; i += 16) {
    const i32x16 v = scores_at(x + i);
    const i32x16 first = LANE + (int32_t)i < (int32_t)end;
    for (uint32_t bits = lanes((v > least) | ((v == least) & first)); bits; bits &= bits - 1)
      out[found++] = i + __builtin_ctz(bits);
  }
  return found;
}
// The same of the scores from `first` on, where those in front of it, to a whole vector, are NEVER
static inline i64 best_from(const int32_t* x, i64 first, i64 end, i64 most, int32_t* out) {
  const i64 whole = first / 16 * 16, found = best(x + whole, end - whole, most, out);
  for (i64 i = 0; i < found; i++) out[i] += whole;
  return found;
}
}  // namespace lists
#endif
"""
