"""The C++ text of the row-wise kernels; `rows.py` binds them.

A value's arithmetic does not depend on where it stands: whole vectors and the end of a row run one piece of code, and
threads split between rows. So a token gets the same bits alone and among others.
"""

from __future__ import annotations

from .printers import cpp

SOURCE = (
    cpp.PRELUDE
    + """
#include <cmath>
#define EACH_ROW _Pragma("omp parallel for num_threads(threads) schedule(static) if (m > 1 && m * k > 65536)")

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

extern "C" void rms_norm(const float* x, const float* w, float* y, int64_t m, int64_t k, float eps, float offset,
                         int64_t threads) {
  EACH_ROW
  for (int64_t r = 0; r < m; r++) {
    const float s = 1.0f / std::sqrt(squares(x + r * k, k, 0) / (float)k + eps);
    for (int64_t i = 0; i < k; i += 16)
      write(y + r * k + i, read(x + r * k + i, k - i) * s * (read(w + i, k - i) + offset), k - i);
  }
}

extern "C" void layer_norm(const float* x, const float* w, const float* b, float* y, int64_t m, int64_t k, float eps,
                           int64_t threads) {
  EACH_ROW
  for (int64_t r = 0; r < m; r++) {
    const float* in = x + r * k;
    f32x16 acc = {};
    for (int64_t i = 0; i < k; i += 16) acc += read(in + i, k - i);
    const float mean = sum(acc) / (float)k, s = 1.0f / std::sqrt(squares(in, k, mean) / (float)k + eps);
    for (int64_t i = 0; i < k; i += 16) {
      const f32x16 shift = b ? read(b + i, k - i) : f32x16{};
      write(y + r * k + i, fma((read(in + i, k - i) - mean) * s, read(w + i, k - i), shift), k - i);
    }
  }
}

// sp, sb, sh, st: steps between rows of positions, and between batches, heads and tokens of x
extern "C" void rotary(const float* x, const int64_t* positions, const float* freq, float* y, int64_t batch,
                       int64_t heads, int64_t tokens, int64_t dim, int64_t sp, int64_t sb, int64_t sh, int64_t st,
                       int64_t r, float scale, int64_t threads) {
  constexpr int64_t BLOCK = 256;
  const int64_t m = batch * tokens, k = heads * dim;
  EACH_ROW
  for (int64_t at = 0; at < m; at++) {
    const int64_t b = at / tokens, t = at % tokens;
    float cosines[BLOCK], sines[BLOCK];
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
        for (int64_t i = 0; i < count; i += 16) {
          const int64_t left = count - i;
          const f32x16 c = read(cosines + i, left), s = read(sines + i, left);
          const f32x16 u = read(in + i, left), v = read(in + i + r, left);
          write(out + i, fma(u, c, -(v * s)), left);
          write(out + i + r, fma(v, c, u * s), left);
        }
      }
    }
    for (int64_t h = 0; h < heads; h++)  // what stands behind the rotated dims is passed on
      for (int64_t i = 2 * r; i < dim; i++)
        y[((b * heads + h) * tokens + t) * dim + i] = x[b * sb + h * sh + t * st + i];
  }
}

// sx, su: steps from row to row
#define ACTIVATION(act)                                                                                           \\
  extern "C" void apply_##act(const float* x, float* y, int64_t m, int64_t k, int64_t sx, int64_t threads) {      \\
    EACH_ROW                                                                                                      \\
    for (int64_t r = 0; r < m; r++)                                                                               \\
      for (int64_t i = 0; i < k; i += 16) write(y + r * k + i, act(read(x + r * sx + i, k - i)), k - i);          \\
  }                                                                                                               \\
  extern "C" void gated_##act(const float* gate, const float* up, float* y, int64_t m, int64_t k, int64_t sx,     \\
                              int64_t su, int64_t threads) {                                                      \\
    EACH_ROW                                                                                                      \\
    for (int64_t r = 0; r < m; r++)                                                                               \\
      for (int64_t i = 0; i < k; i += 16)                                                                         \\
        write(y + r * k + i, act(read(gate + r * sx + i, k - i)) * read(up + r * su + i, k - i), k - i);          \\
  }
ACTIVATION(relu) ACTIVATION(sigmoid) ACTIVATION(silu) ACTIVATION(tanh) ACTIVATION(gelu) ACTIVATION(gelu_tanh)
"""
)
