"""What all C++ attention kernels share: the two structs of a call, vector functions, and the walk over seen tokens."""

from __future__ import annotations

HEADER = """\
#ifndef SMELT_ATTENTION
#define SMELT_ATTENTION
struct Pages {                      // a body: pages of one KV head each, in a pool of N slots
  const void* const* parts;         // of keys, then of values: [N, ...], calibrated ones [G, ...] or [1, ...]
  const int64_t* steps;             // of a calibrated part from one KV head to the next, 0 where they share it
  const int32_t* pages;             // [N, 2] tokens, position of the first
  const int32_t* places;            // [N, CAP] positions, or null: neighbours
  const float* bias;                // [N, CAP] added to logits, or null
  const int32_t *table, *held;      // [B, G, P] slots; [B, G] of them in use
  const int32_t *picks, *picked;    // [B, T, G, longest] what a query reads of this body, [B, T, G] how many; or null
  int64_t columns, longest;         // P, and of lists
};
struct Buffers {                    // one layer of a cache
  const void *sink_k, *sink_v;      // [B, G, sink, D], [B, G, sink, E]
  const void *tail_k, *tail_v;      // [B, G, W, D], [B, G, W, E]; the step's new tokens lie behind the tail
  const Pages* bodies;
  const int32_t *counts, *sink_at;  // [B, 4] sink, -, tail, length; [B, G] position of the first sink, or null: 0
  const float* turns;               // [capacity, 2 R] cosines, then sines, of every position
  int64_t rows, width;              // B, W
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
#if defined(__AVX512F__)
static inline f32x16 larger(f32x16 a, f32x16 b) { return (f32x16)_mm512_max_ps((__m512)a, (__m512)b); }
#define IN_REGISTER(x) asm("" : "+v"(x))  // GCC 12 else loads it again for every use, and loads are what limits
#else
static inline f32x16 larger(f32x16 a, f32x16 b) { return choose(a > b, a, b); }
#define IN_REGISTER(x)
#endif
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
// Words of 16 rows of M neighbours, so that y[16 * m + i] becomes word m of row i. M is a power of two.
#define HALF(a, b, o) \
  PICK(a, b, o, 2 + o, 4 + o, 6 + o, 8 + o, 10 + o, 12 + o, 14 + o, 16 + o, 18 + o, 20 + o, 22 + o, 24 + o, 26 + o, \
       28 + o, 30 + o)
template <int M> static inline void deal(const void* x, i32x16* y) {
  i32x16 held[M];
  for (int i = 0; i < M; i++) y[i] = load_words((const char*)x + 64 * i);
  for (int step = 1; step < M; step *= 2) {  // even places first, then the odd: log2(M) times
    for (int i = 0; i < M; i++) held[i] = y[i];
    for (int i = 0; i < M / 2; i++) y[i] = HALF(held[2 * i], held[2 * i + 1], 0);
    for (int i = 0; i < M / 2; i++) y[M / 2 + i] = HALF(held[2 * i], held[2 * i + 1], 1);
  }
}
#undef HALF
template <int M> static inline void deal_words(const void* x, void* y) {
  i32x16 words[M];
  deal<M>(x, words);
  memcpy(y, words, sizeof words);
}
template <int M> static inline void deal_halves(const uint16_t* x, uint16_t* y) {  // the same for 16 rows of M halves
  if constexpr (M == 1) {
    memcpy(y, x, 32);
  } else {
    i32x16 words[M / 2];
    deal<M / 2>(x, words);
    for (int m = 0; m < M / 2; m++) {
      const u16x16 low = __builtin_convertvector(words[m], u16x16);
      const u16x16 high = __builtin_convertvector((i32x16)((u32x16)words[m] >> 16), u16x16);
      memcpy(y + 32 * m, &low, 32), memcpy(y + 32 * m + 16, &high, 32);
    }
  }
}
#undef PICK

// Asks for share `j` of `shares` of the SIZE bytes of an item: pages of a head do not lie side by side.
template <int64_t SIZE> static inline void fetch(const void* items, int64_t item, int64_t j, int64_t shares) {
  const char* from = (const char*)items + item * SIZE;
  for (int64_t i = SIZE * j / shares; i < SIZE * (j + 1) / shares; i += 64) __builtin_prefetch(from + i);
}

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
