"""What the C++ of every kernel begins with: vectors of sixteen lanes, and what is done to them on each CPU."""

PRELUDE = """\
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int16_t i16x16 __attribute__((vector_size(32)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef uint8_t u8x64 __attribute__((vector_size(64)));

template <class V, class T> static inline V load(const T* p) {  // 16 neighbours, at any alignment
  V v;
  static_assert(sizeof(v) == 16 * sizeof(T), "a vector has 16 lanes");
  memcpy(&v, p, sizeof v);
  return v;
}
static inline i32x16 load_words(const void* p) {
  i32x16 v;
  memcpy(&v, p, sizeof v);
  return v;
}
static inline u8x64 load_bytes(const void* p) {
  u8x64 v;
  memcpy(&v, p, sizeof v);
  return v;
}
// the bits of a where the mask has ones, else those of b
static inline i32x16 either(uint32_t mask, i32x16 a, i32x16 b) {
#if defined(__AVX512F__)
  return (i32x16)_mm512_ternarylogic_epi32(_mm512_set1_epi32((int)mask), (__m512i)a, (__m512i)b, 0xca);
#else
  return b ^ ((a ^ b) & (int32_t)mask);
#endif
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
// lane i becomes lane i ^ w, of a vector of sixteen words
#define PAIRED(w)                                                                                                 \\
  0 ^ w, 1 ^ w, 2 ^ w, 3 ^ w, 4 ^ w, 5 ^ w, 6 ^ w, 7 ^ w, 8 ^ w, 9 ^ w, 10 ^ w, 11 ^ w, 12 ^ w, 13 ^ w, 14 ^ w, 15 ^ w
#if defined(__clang__)
#define CROSSED(v, w) __builtin_shufflevector(v, v, PAIRED(w))
#else
#define CROSSED(v, w) __builtin_shuffle(v, i32x16{PAIRED(w)})
#endif
template <class V> static inline auto sum(V v) {  // pairwise, always in the same order
  v += CROSSED(v, 8);
  v += CROSSED(v, 4);
  v += CROSSED(v, 2);
  v += CROSSED(v, 1);
  return v[0];
}

// GCC 12 widens bytes to words lane by lane, 83 instructions. On AVX-512 unsigned ones take one and signed ones three
// (a broadcast, a shuffle inside 16-byte quarters, a shift); elsewhere going through 16 bits takes 6.
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
static inline i32x16 widen(u8x16 v) { return (i32x16)_mm512_maskz_cvtepu8_epi32(0xffff, (__m128i)v); }
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
#if defined(__AVX512F__)  // GCC 12 widens by halves
static inline u32x16 widen(u16x16 h) { return (u32x16)_mm512_cvtepu16_epi32((__m256i)h); }
#else
static inline u32x16 widen(u16x16 h) { return __builtin_convertvector(h, u32x16); }
#endif
static inline f32x16 bf16_to_f32(u16x16 h) { return (f32x16)(widen(h) << 16); }

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
#if defined(__AVX512F__)
static inline f32x16 f16_to_f32(u16x16 h) { return (f32x16)_mm512_cvtph_ps((__m256i)h); }
#elif defined(__F16C__)
static inline f32x16 f16_to_f32(u16x16 h) {
  __m128i half[2];
  memcpy(half, &h, sizeof h);
  const __m256 whole[2] = {_mm256_cvtph_ps(half[0]), _mm256_cvtph_ps(half[1])};
  f32x16 x;
  memcpy(&x, whole, sizeof x);
  return x;
}
#elif defined(__clang__) && defined(__FLT16_MAX__)
static inline f32x16 f16_to_f32(u16x16 h) {
  typedef _Float16 f16x16 __attribute__((vector_size(32)));
  return __builtin_convertvector((f16x16)h, f32x16);
}
#else
// GCC 12 converts _Float16 vectors lane by lane. Shift exponent and mantissa into place, let a product by 2^112 correct
// the bias (exact, subnormals included), then restore infinities, NaN and the sign.
static inline f32x16 f16_to_f32(u16x16 h) {
  u32x16 w = widen(h), em = w & 0x7fffu;
  f32x16 x = (f32x16)(em << 13) * 0x1p112f;
  u32x16 special = (u32x16)(em > 0x7bffu) & 0x7f800000u;
  return (f32x16)((u32x16)x | special | (w & 0x8000u) << 16);
}
#endif

// entries of a table of SIZE numbers at computed places
template <int SIZE> static inline f32x16 take_float32(const float* table, i32x16 at) {
#if defined(__AVX512F__)
  if (SIZE <= 16) {
    f32x16 held = {};
    memcpy(&held, table, (SIZE <= 16 ? SIZE : 16) * sizeof(float));
    return (f32x16)_mm512_permutexvar_ps((__m512i)at, (__m512)held);
  }
#endif
  f32x16 v;
  for (int i = 0; i < 16; i++) v[i] = table[at[i]];
  return v;
}
template <int SIZE> static inline u16x16 take_float16(const uint16_t* table, i32x16 at) {
  u16x16 v;
#if defined(__AVX512F__)
  if (SIZE <= 16) {
    u16x16 held = {};
    memcpy(&held, table, (SIZE <= 16 ? SIZE : 16) * sizeof(uint16_t));
    const i32x16 wide = __builtin_convertvector(held, i32x16);
    return __builtin_convertvector((i32x16)_mm512_permutexvar_epi32((__m512i)at, (__m512i)wide), u16x16);
  }
#endif
#if defined(__AVX512BW__)
  // 0.7 ns instead of 2.6 (Zen 5, 2026-11-22); from larger tables sixteen loads, where a gather took 8 ns
  if constexpr (SIZE <= 64) {
    __m512i low = {}, high = {};
    memcpy(&low, table, (SIZE < 32 ? SIZE : 32) * sizeof(uint16_t));
    if constexpr (SIZE > 32) memcpy(&high, table + 32, (SIZE - 32) * sizeof(uint16_t));
    return (u16x16)_mm512_cvtepi32_epi16(_mm512_permutex2var_epi16(low, (__m512i)at, high));
  }
#endif
  for (int i = 0; i < 16; i++) v[i] = table[at[i]];
  return v;
}
template <int SIZE> static inline u16x16 take_bfloat16(const uint16_t* table, i32x16 at) {
  return take_float16<SIZE>(table, at);
}
template <int SIZE> static inline i32x16 take_int32(const int32_t* table, i32x16 at) {
  i32x16 v;
  for (int i = 0; i < 16; i++) v[i] = table[at[i]];
  return v;
}

// x[at % OF] by lane, OF a power of two
template <int OF> static inline f32x16 pick(const float* x, i32x16 at) {
#ifdef __AVX512DQ__
  if constexpr (OF == 4) return (f32x16)_mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(x)), (__m512i)at);
  if constexpr (OF == 8)
    return (f32x16)_mm512_permutexvar_ps((__m512i)at, _mm512_broadcast_f32x8(_mm256_loadu_ps(x)));
  if constexpr (OF == 16) return (f32x16)_mm512_permutexvar_ps((__m512i)at, _mm512_loadu_ps(x));
#endif
  f32x16 v;
  for (int i = 0; i < 16; i++) v[i] = x[at[i] & (OF - 1)];
  return v;
}

// acc + the products of four neighbouring bytes a lane with the four signed bytes of x
static inline i32x16 dot4(i32x16 acc, u8x64 a, int32_t x) {
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
  return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, _mm512_set1_epi32(x));
#elif defined(__AVX2__)
  __m256i sums[2], bytes[2];
  memcpy(sums, &acc, sizeof acc);
  memcpy(bytes, &a, sizeof a);
  const __m256i four = _mm256_set1_epi32(x);
  for (int i = 0; i < 2; i++) {
#if defined(__AVXVNNI__)
    sums[i] = _mm256_dpbusd_avx_epi32(sums[i], bytes[i], four);
#else  // no product of bytes here that cannot saturate: even and odd bytes as 16 bits each
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(bytes[i], _mm256_set1_epi16(255)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(bytes[i], 8), _mm256_srai_epi16(four, 8));
    sums[i] = _mm256_add_epi32(sums[i], _mm256_add_epi32(even, odd));
#endif
  }
  memcpy(&acc, sums, sizeof acc);
  return acc;
#else
  const i32x16 word = (i32x16)a;
  for (int j = 0; j < 4; j++) acc += (word >> (8 * j) & 255) * (x << (24 - 8 * j) >> 24);
  return acc;
#endif
}
"""
