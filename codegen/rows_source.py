"""The C++ text of functions on vectors of floats, and of the row-wise kernels; `rows.py` binds the latter.

A value's arithmetic does not depend on where it stands: whole vectors and the end of a row run one piece of code, and
ranks split between rows. So a token gets the same bits alone and among others.
"""

from __future__ import annotations

MATH = """\
#include <math.h>

static inline f32x16 choose(i32x16 mask, f32x16 a, f32x16 b) {
  return (f32x16)(((i32x16)a & mask) | ((i32x16)b & ~mask));
}
static inline f32x16 within(f32x16 x, float low, float high) {  // NaN stays
  x = choose(x < low, splat(low), x);
  return choose(x > high, splat(high), x);
}
static inline f32x16 read(const float* x, int64_t count) {  // zeros behind the end
  if (count >= 16) return load<f32x16>(x);
  f32x16 v = {};
  memcpy(&v, x, count * sizeof(float));
  return v;
}
static inline void write(float* y, f32x16 v, int64_t count) {
  if (count >= 16) store(y, v);
  else memcpy(y, &v, count * sizeof(float));
}

template <class... C> static inline f32x16 polynomial(f32x16 x, C... c) {  // highest power first
  f32x16 p = {};
  ((p = fma(p, x, splat(c))), ...);
  return p;
}
// e^x to 2 ulp for |x| <= 87, and e^-87 or e^87 beyond; NaN stays
static inline f32x16 exponential(f32x16 x) {
  x = within(x, -87.0f, 87.0f);
  const f32x16 shifted = fma(x, splat(1.44269504f), splat(12582912.0f));  // 1.5 * 2^23: rounds into the low bits
  const f32x16 whole = shifted - 12582912.0f;
  const f32x16 f = fma(whole, splat(-1.42860677e-6f), fma(whole, splat(-0.693145752f), x));
  const f32x16 p = polynomial(f, 1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f);
  return choose(x == x, (f32x16)((i32x16)p + ((i32x16)shifted << 23)), x);
}
static inline f32x16 relu(f32x16 x) { return choose(x < 0.0f, f32x16{}, x); }
static inline f32x16 sigmoid(f32x16 x) { return 1.0f / (exponential(-x) + 1.0f); }
static inline f32x16 silu(f32x16 x) { return x / (exponential(-x) + 1.0f); }
static inline f32x16 tanh(f32x16 x) {  // a series where e^2x - 1 would cancel
  const f32x16 e = exponential(x * 2.0f), q = x * x;
  const f32x16 s = polynomial(q, 62.0f / 2835, -17.0f / 315, 2.0f / 15, -1.0f / 3);
  return choose(q < 0.09f, fma(x * q, s, x), (e - 1.0f) / (e + 1.0f));
}
// sin x and cos x to 1e-7 for |x| <= 1e6: what is left of x less its multiple of pi / 2 is found in doubles
static inline void sine_cosine(f32x16 x, f32x16& sine, f32x16& cosine) {
  typedef double f64x8 __attribute__((vector_size(64)));
  typedef float f32x8 __attribute__((vector_size(32)));
  typedef int32_t i32x8 __attribute__((vector_size(32)));
  f32x8 left[2];
  i32x8 quarters[2];
  memcpy(left, &x, sizeof left);
  for (int h = 0; h < 2; h++) {
    const f64x8 whole = __builtin_convertvector(left[h], f64x8);
    const f64x8 n = whole * 0.63661977236758134 + 6755399441055744.0 - 6755399441055744.0;  // 1.5 * 2^52: rounds
    left[h] = __builtin_convertvector(whole - n * 1.5707963267948966, f32x8);
    quarters[h] = __builtin_convertvector(n, i32x8);
  }
  i32x16 q;
  memcpy(&x, left, sizeof x), memcpy(&q, quarters, sizeof q);
  const f32x16 z = x * x;
  const f32x16 s = fma(x * z, polynomial(z, -1.95152959e-4f, 8.33216087e-3f, -1.66666546e-1f), x);
  const f32x16 half = fma(z, splat(-0.5f), splat(1.0f));
  const f32x16 c = fma(z * z, polynomial(z, 2.44331571e-5f, -1.38873163e-3f, 4.16666457e-2f), half);
  const i32x16 odd = -(q & 1);
  sine = (f32x16)((i32x16)choose(odd, c, s) ^ (q & 2) << 30);
  cosine = (f32x16)((i32x16)choose(odd, s, c) ^ ((q + 1) & 2) << 30);
}
static inline f32x16 gelu_tanh(f32x16 x) {
  const f32x16 u = fma(x * x * 0.044715f, x, x) * 0.79788456080286536f;
  return x * 0.5f * (tanh(u) + 1.0f);
}
static inline f32x16 gelu(f32x16 x) {  // erf by Abramowitz and Stegun 7.1.26, to 2e-7
  const f32x16 z = choose(x < 0.0f, -x, x) * 0.70710678118654752f, t = 1.0f / fma(z, splat(0.3275911f), splat(1.0f));
  const f32x16 p = polynomial(t, 1.061405429f, -1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f, 0.0f) *
                   exponential(z * -z);  // 1 - erf
  return x * choose(x < 0.0f, p * 0.5f, fma(p, splat(-0.5f), splat(1.0f)));
}
"""

KERNELS = """\
#pragma GCC diagnostic ignored "-Wunused-function"
static inline float squares(const float* x, int64_t k, float mean) {
  f32x16 acc = {};
  for (int64_t i = 0; i < k; i += 16) {
    f32x16 v = read(x + i, k - i) - mean;
    if (k - i < 16)
      for (int64_t j = k - i; j < 16; j++) v[j] = 0;
    acc = fma(v, v, acc);
  }
  return sum(acc);
}

static inline float by_rms(const float* x, int64_t k, float eps) { return 1.0f / sqrtf(squares(x, k, 0) / k + eps); }
static inline void normalize(const float* x, const float* w, float* y, int64_t k, float s, float offset) {
  for (int64_t i = 0; i < k; i += 16)
    write(y + i, read(x + i, k - i) * s * (read(w + i, k - i) + offset), k - i);
}

// x, w, y, m, k, eps, offset
static void rms_norm(Rank& rank, const int64_t* c) {
  const int64_t k = c[5];
  share(rank, c[4], [&](int64_t r) {
    const float* x = (const float*)c[1] + r * k;
    normalize(x, (const float*)c[2], (float*)c[3] + r * k, k, by_rms(x, k, real(c[6])), real(c[7]));
  });
}

// x, w, b, y, m, k, eps
static void layer_norm(Rank& rank, const int64_t* c) {
  const float *x = (const float*)c[1], *w = (const float*)c[2], *b = (const float*)c[3];
  float* y = (float*)c[4];
  const int64_t k = c[6];
  const float eps = real(c[7]);
  share(rank, c[5], [&](int64_t r) {
    const float* in = x + r * k;
    f32x16 acc = {};
    for (int64_t i = 0; i < k; i += 16) acc += read(in + i, k - i);
    const float mean = sum(acc) / (float)k, s = 1.0f / sqrtf(squares(in, k, mean) / (float)k + eps);
    for (int64_t i = 0; i < k; i += 16) {
      const f32x16 shift = b ? read(b + i, k - i) : f32x16{};
      write(y + r * k + i, fma((read(in + i, k - i) - mean) * s, read(w + i, k - i), shift), k - i);
    }
  });
}

// The scale of g numbers whose greatest magnitude is `levels` steps; NaN where one is NaN or infinite, whose bits, as
// integers, are larger than those of any number
static inline float step_of(const float* x, int64_t g, float levels) {
  const auto higher = [](i32x16 a, i32x16 b) { return a > b ? a : b; };
  i32x16 top = {};
  for (int64_t i = 0; i < g; i += 16) top = higher(top, (i32x16)read(x + i, g - i) & 0x7fffffff);
  top = higher(top, CROSSED(top, 8));
  top = higher(top, CROSSED(top, 4));
  top = higher(top, CROSSED(top, 2));
  top = higher(top, CROSSED(top, 1));
  const float most = ((f32x16)top)[0];
  return most / levels + most * 0.0f;
}
static inline f32x16 in_steps(f32x16 x, float scale) {  // adding 1.5 * 2^23 rounds to an integer, ties to even
  return x / splat(scale == 0 ? 1.0f : scale) + 12582912.0f - 12582912.0f;
}

// x, y, m, k, group, levels: rounded values
static void round_rows(Rank& rank, const int64_t* c) {
  const int64_t k = c[4], g = c[5];
  share(rank, c[3], [&](int64_t r) {
    for (int64_t at = r * k; at < (r + 1) * k; at += g) {
      const float *x = (const float*)c[1] + at, scale = step_of(x, g, real(c[6]));
      for (int64_t i = 0; i < g; i += 16)
        write((float*)c[2] + at + i, in_steps(read(x + i, g - i), scale) * scale, g - i);
    }
  });
}

static inline i8x16 low_bytes(i32x16 v) {
#if defined(__AVX512F__)  // GCC 12 narrows lane by lane
  return (i8x16)_mm512_cvtepi32_epi8((__m512i)v);
#else
  return __builtin_convertvector(v, i8x16);
#endif
}

// Codes of row r in groups of g, with a scale and the sum of codes each: scale = max|x| / 127, code = round(x / scale).
// `wide` rows stand side by side: codes [M / wide, K / 4, wide, 4], scales and sums [M / wide, K / g, wide].
// x holds columns `from` to `to` - 1, whole groups.
static inline void quantize(const float* x, const int64_t* c, int64_t r, int64_t from, int64_t to) {
  const int64_t k = c[6], g = c[7], wide = c[8], first = r / wide * wide, seat = r % wide;
  int8_t* codes = (int8_t*)c[2] + first * k + 4 * seat;
  float* scales = (float*)c[3] + first * (k / g) + from / g * wide + seat;
  int32_t* sums = (int32_t*)c[4] + first * (k / g) + from / g * wide + seat;
  for (int64_t at = from; at < to; at += g, x += g, scales += wide, sums += wide) {
    const float scale = step_of(x, g, 127.0f);
    i32x16 total = {};
    for (int64_t i = 0; i < g; i += 16) {
      const int64_t left = g - i < 16 ? g - i : 16;
      const i32x16 q = __builtin_convertvector(in_steps(read(x + i, left), scale), i32x16);
      const i8x16 narrow = low_bytes(q);
      total += q;
      for (int64_t j = 0; j < left; j += 4) memcpy(codes + (at + i + j) * wide, (const int8_t*)&narrow + j, 4);
    }
    *scales = scale, *sums = sum(total);
  }
}

// each(row, from, to): columns of rows in pieces of whole groups. Rows that stand side by side share cache lines, and
// are one rank's.
template <class F> static inline void by_pieces(Rank& rank, const int64_t* c, F each) {
  const int64_t k = c[6], piece = (512 + c[7] - 1) / c[7] * c[7], pieces = (k + piece - 1) / piece;
  share(rank, (c[5] + c[8] - 1) / c[8] * pieces, [&](int64_t unit) {
    const int64_t block = unit / pieces, from = unit % pieces * piece, to = from + piece < k ? from + piece : k;
    for (int64_t r = block * c[8]; r < (block + 1) * c[8] && r < c[5]; r++) each(r, from, to);
  });
}

// x, codes, scales, sums, m, k, group, wide
static void quantize_rows(Rank& rank, const int64_t* c) {
  by_pieces(rank, c, [&](int64_t r, int64_t from, int64_t to) {
    quantize((const float*)c[1] + r * c[6] + from, c, r, from, to);
  });
}

// x, codes, scales, sums, m, k, group, wide, w, eps, offset, y: the codes of the normalized rows, which go by y
static void rms_norm_quantize(Rank& rank, const int64_t* c) {
  by_pieces(rank, c, [&](int64_t r, int64_t from, int64_t to) {
    const float *x = (const float*)c[1] + r * c[6], s = by_rms(x, c[6], real(c[10]));
    float* y = (float*)c[12] + r * c[6] + from;
    normalize(x + from, (const float*)c[9] + from, y, to - from, s, real(c[11]));
    quantize(y, c, r, from, to);
  });
}

// x, positions, freq, y, batch, heads, tokens, dim; steps between rows of positions, and between batches, heads and
// tokens of x; rotated pairs, scale
static void rotary(Rank& rank, const int64_t* c) {
  const float *x = (const float*)c[1], *freq = (const float*)c[3];
  const int64_t* positions = (const int64_t*)c[2];
  float* y = (float*)c[4];
  const int64_t heads = c[6], tokens = c[7], dim = c[8], sp = c[9], sb = c[10], sh = c[11], st = c[12], r = c[13];
  const float scale = real(c[14]);
  share(rank, c[5] * tokens, [&](int64_t at) {
    const int64_t b = at / tokens, t = at % tokens;
    for (int64_t i = 0; i < r; i += 16) {
      const int64_t left = r - i;
      f32x16 sine, cosine;
      sine_cosine((float)positions[b * sp + t] * read(freq + i, left), sine, cosine);
      sine *= scale, cosine *= scale;
      for (int64_t h = 0; h < heads; h++) {
        const float* in = x + b * sb + h * sh + t * st + i;
        float* out = y + ((b * heads + h) * tokens + t) * dim + i;
        const f32x16 u = read(in, left), v = read(in + r, left);
        write(out, fma(u, cosine, -(v * sine)), left);
        write(out + r, fma(v, cosine, u * sine), left);
      }
    }
    for (int64_t h = 0; h < heads; h++)  // what stands behind the rotated dims is passed on
      for (int64_t i = 2 * r; i < dim; i++)
        y[((b * heads + h) * tokens + t) * dim + i] = x[b * sb + h * sh + t * st + i];
  });
}

// x, y, m, k, steps from row to row of x; and gate, up, y, m, k, their steps
#define ACTIVATION(act)                                                                                           \\
  static void apply_##act(Rank& rank, const int64_t* c) {                                                         \\
    const int64_t k = c[4];                                                                                       \\
    share(rank, c[3], [&](int64_t r) {                                                                            \\
      const float* x = (const float*)c[1] + r * c[5];                                                             \\
      for (int64_t i = 0; i < k; i += 16) write((float*)c[2] + r * k + i, act(read(x + i, k - i)), k - i);        \\
    });                                                                                                           \\
  }                                                                                                               \\
  static void gated_##act(Rank& rank, const int64_t* c) {                                                         \\
    const int64_t k = c[5];                                                                                       \\
    share(rank, c[4], [&](int64_t r) {                                                                            \\
      const float *gate = (const float*)c[1] + r * c[6], *up = (const float*)c[2] + r * c[7];                     \\
      for (int64_t i = 0; i < k; i += 16)                                                                         \\
        write((float*)c[3] + r * k + i, act(read(gate + i, k - i)) * read(up + i, k - i), k - i);                 \\
    });                                                                                                           \\
  }
ACTIVATION(relu) ACTIVATION(sigmoid) ACTIVATION(silu) ACTIVATION(tanh) ACTIVATION(gelu) ACTIVATION(gelu_tanh)

// x, y, four sizes, four steps of x
static void copy(Rank& rank, const int64_t* c) {
  share(rank, c[3] * c[4], [&](int64_t at) {
    const float* x = (const float*)c[1] + at / c[4] * c[7] + at % c[4] * c[8];
    float* y = (float*)c[2] + at * c[5] * c[6];
    for (int64_t i = 0; i < c[5]; i++)
      for (int64_t j = 0; j < c[6]; j++) *y++ = x[i * c[9] + j * c[10]];
  });
}

// x, index, y, rows, tokens, bytes of a token
static void pick(Rank& rank, const int64_t* c) {
  share(rank, c[4], [&](int64_t b) {
    memcpy((char*)c[3] + b * c[6], (const char*)c[1] + (b * c[5] + ((const int64_t*)c[2])[b]) * c[6], c[6]);
  });
}

static inline u16x16 low_words(u32x16 v) {
#if defined(__AVX512F__)  // as above
  return (u16x16)_mm512_cvtepi32_epi16((__m512i)v);
#else
  return __builtin_convertvector(v, u16x16);
#endif
}
static inline u16x16 to_bf16(f32x16 x) {  // ties to even; NaN stays one
  const u32x16 bits = (u32x16)x, nan = (u32x16)(x != x);
  return low_words((nan & 0x7fc0) | (~nan & (bits + 0x7fff + (bits >> 16 & 1)) >> 16));
}
static inline u16x16 to_f16(f32x16 x) {  // ties to even
#if defined(__AVX512F__)
  return (u16x16)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#else
  const u32x16 f = (u32x16)x & 0x7fffffffu, sign = (u32x16)x >> 16 & 0x8000u;
  const u32x16 low = (u32x16)((f32x16)f + 0.5f) - 0x3f000000u;  // subnormal: rounds at the last bit that a half has
  const u32x16 whole = (f + 0xc8000fffu + (f >> 13 & 1)) >> 13;
  const u32x16 small = (u32x16)(f < 0x38800000u), large = (u32x16)(f >= 0x477ff000u), nan = (u32x16)(f > 0x7f800000u);
  const u32x16 finite = (small & low) | (~small & whole);
  return low_words(sign | (nan & 0x7e00) | (~nan & large & 0x7c00) | (~large & finite));
#endif
}

// tokens [B, T] as they lie are written behind the tail of a cache: x, steps of x by batch, head and token, rows B,
// heads G, tokens T, dim, tail, slots W, counts [B, 4]
template <class T, class F> static inline void append(Rank& rank, const int64_t* c, F narrow) {
  const int64_t heads = c[6], tokens = c[7], dim = c[8], slots = c[10];
  const int32_t* counts = (const int32_t*)c[11];
  share(rank, c[5] * tokens, [&](int64_t at) {
    const int64_t b = at / tokens, t = at % tokens;
    for (int64_t h = 0; h < heads; h++) {
      const float* x = (const float*)c[1] + b * c[2] + h * c[3] + t * c[4];
      T* y = (T*)c[9] + ((b * heads + h) * slots + counts[4 * b + 2] + t) * dim;
      for (int64_t i = 0; i < dim; i += 16) {
        const auto v = narrow(read(x + i, dim - i));
        memcpy(y + i, &v, (dim - i < 16 ? dim - i : 16) * sizeof(T));
      }
    }
  });
}
static void append_float32(Rank& rank, const int64_t* c) {
  append<float>(rank, c, [](f32x16 x) { return x; });
}
static void append_float16(Rank& rank, const int64_t* c) { append<uint16_t>(rank, c, to_f16); }
static void append_bfloat16(Rank& rank, const int64_t* c) { append<uint16_t>(rank, c, to_bf16); }
"""
