"""What all C++ attention kernels share: the two structs of a call, vector functions, and the walk over seen tokens."""

from __future__ import annotations

HEADER = """\
#ifndef SMELT_ATTENTION
#define SMELT_ATTENTION
struct Buffers {                    // one layer of a cache
  const void *sink_k, *sink_v;      // [B, G, sink, D], [B, G, sink, E]
  const void *tail_k, *tail_v;      // [B, G, W, D], [B, G, W, E]; the step's new tokens lie behind the tail
  const void *parts[8];            // body, keys before values: [B, G, P, ...]
  const int32_t *places, *counts;   // [B, G, P * kept] positions; [B, 4] sink, body, tail, length
  int64_t rows, width, pages;       // B, W, P
};
struct Call {
  const float *q;                   // [B, H, T, D] by these strides; D is contiguous
  int64_t q_row, q_head, q_token;
  float *out;                       // [B, H, T, E] likewise
  int64_t out_row, out_head, out_token;
  int64_t tokens;                   // T
  const int64_t *positions;         // [B, T]
  const uint64_t *visible;          // [B, T, ceil(T / 64)]: which new tokens a new token sees
  const float *sinks;               // [H], or null
  int32_t *finished;                // for a block of queries and row: G zeros
  float *work;                      // for a block of queries and row: a chunk's QUERIES * H * (padded E + 2)
  int64_t blocks;                   // of queries that the scratch holds
  float scale, softcap;             // softcap 0: none
};

namespace {
static inline f32x16 larger(f32x16 a, f32x16 b) { return choose(a > b, a, b); }
static inline float top(f32x16 v) {
  v = larger(v, CROSSED(v, 8));
  v = larger(v, CROSSED(v, 4));
  v = larger(v, CROSSED(v, 2));
  return larger(v, CROSSED(v, 1))[0];
}
// e^x for x <= 88, to 2 ulp; below -87 it stays at e^-87, which no float32 sum next to a 1 notices
static inline f32x16 decay(f32x16 x) {
  x = larger(x, splat(-87.0f));
  f32x16 shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer in the low bits
  f32x16 whole = shifted - 12582912.0f;
  f32x16 f = x - whole * 0.693145752f - whole * 1.42860677e-6f;
  f32x16 p = f * (1.0f / 5040) + 1.0f / 720;
  p = p * f + 1.0f / 120;
  p = p * f + 1.0f / 24;
  p = p * f + 1.0f / 6;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  return (f32x16)((i32x16)p + ((i32x16)shifted << 23));
}
static inline float decay(float x) { return decay(splat(x))[0]; }
static inline f32x16 tangent(f32x16 x) {  // tanh, to 1e-7 absolute
  f32x16 e = decay(larger(splat(-9.0f), -larger(splat(-9.0f), -x)) * 2.0f);
  return (e - 1.0f) / (e + 1.0f);
}
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
static inline f32x16 sums(const f32x16* a) {  // lane i: the sum of a[i], each in the same order
  f32x16 b[8], c[4], d[2];
  for (int i = 0; i < 8; i++)
    b[i] = PICK(a[i], a[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           PICK(a[i], a[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  for (int i = 0; i < 4; i++)
    c[i] = PICK(b[i], b[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           PICK(b[i], b[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int i = 0; i < 2; i++)
    d[i] = PICK(c[i], c[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           PICK(c[i], c[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  return PICK(d[0], d[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
         PICK(d[0], d[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}
#undef PICK

struct Seen {  // the new tokens that a query sees, in order
  const uint64_t* word;
  uint64_t bits;
  int64_t base, count;
  Seen(const uint64_t* words, int64_t n) : word(words), bits(words[0]), base(0), count(0) {
    for (int64_t i = 0; i < n; i++) count += __builtin_popcountll(words[i]);
  }
  int64_t next() {
    while (!bits) bits = *++word, base += 64;
    int64_t j = base + __builtin_ctzll(bits);
    bits &= bits - 1;
    return j;
  }
};
}  // namespace
#endif
"""
