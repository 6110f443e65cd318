"""The C++ arithmetic of one tile of attention: logits of up to 32 tokens, the running softmax, the mix of values.

`tile` must not be inlined: every tile of a kind then runs the same instructions, so that a query gets the same bits
whatever stands around it.
"""

from __future__ import annotations

ARITHMETIC = """\
#ifdef __AVX512F__
constexpr int HEADS = 4, VECTORS = 4;  // accumulators that fit the registers
#else
constexpr int HEADS = 2, VECTORS = 2;
#endif

template <int... W> struct Numbers {};
template <int N, int... W> struct Below : Below<N - 1, N - 1, W...> {};  // All: the numbers 0 to N - 1
template <int... W> struct Below<0, W...> { typedef Numbers<W...> All; };

struct Values {  // as rows
  const float* const* rows;
  template <int64_t C> f32x16 at(int n) const { return load<f32x16>(rows[n] + C); }
};
// acc[h] += add[h] + Σ_n weight[h][n] * v[n] for N heads, from column FIRST on; the columns of one span share weights
template <int64_t SPANS, int N, int64_t FIRST, class V, int... W>
static inline void mix(const float* weight, const float* add, const V& v, int count, float* acc,
                       Numbers<W...>) {
  constexpr int64_t MANY = SPANS ? SPANS : 1, WIDE = EP / MANY;
  f32x16 o[N][sizeof...(W)];
  for (int h = 0; h < N; h++)
    for (int w = 0; w < (int)sizeof...(W); w++) {
      o[h][w] = load<f32x16>(acc + h * EP + FIRST + 16 * w);
      if (SPANS) o[h][w] += add[h * MANY + (FIRST + 16 * w) / WIDE];
    }
  for (int n = 0; n < count; n++) {
    const auto join = [&](f32x16 x, int w) {
      IN_REGISTER(x);
      for (int h = 0; h < N; h++) {
        const float factor = weight[(h * MANY + (FIRST + 16 * w) / WIDE) * 32 + n];
        o[h][w] = fma(splat(factor), x, o[h][w]);
      }
    };
    (join(v.template at<FIRST + 16 * W>(n), W), ...);
  }
  for (int h = 0; h < N; h++)
    for (int w = 0; w < (int)sizeof...(W); w++) store(acc + h * EP + FIRST + 16 * w, o[h][w]);
}
template <int64_t SPANS, int N, int64_t FIRST, class V>
static inline void mix(const float* weight, const float* add, const V& v, int count, float* acc) {
  constexpr int W = EP - FIRST < 16 * VECTORS ? (EP - FIRST) / 16 : VECTORS;
  mix<SPANS, N, FIRST>(weight, add, v, count, acc, typename Below<W>::All());
  if constexpr (FIRST + 16 * W < EP) mix<SPANS, N, FIRST + 16 * W>(weight, add, v, count, acc);
}

struct ByRow {  // keys as rows; those from the last token up to whole vectors of tokens must be readable
  const float* const* k;
  template <int N> void dot(const float* q, int halves, f32x16 (*s)[2]) const {
    for (int h = 0; h < halves; h++) {
      f32x16 dots[N][16];
      for (int i = 0; i < 16; i++) {
        const float* row = k[16 * h + i];
        f32x16 x[N], part = load<f32x16>(row);
        IN_REGISTER(part);
        for (int r = 0; r < N; r++) x[r] = load<f32x16>(q + r * DP) * part;
        for (int64_t d = 16; d < DP; d += 16) {
          part = load<f32x16>(row + d);
          IN_REGISTER(part);
          for (int r = 0; r < N; r++) x[r] = fma(load<f32x16>(q + r * DP + d), part, x[r]);
        }
        for (int r = 0; r < N; r++) dots[r][i] = x[r];
      }
      for (int r = 0; r < N; r++) s[r][h] = sums(dots[r]);
    }
  }
};
// x[r][w] += q[r] * part[w]: one channel of 16 W keys and of N queries
template <int N, int W> static inline void join(const float* q, f32x16 (&part)[W], f32x16 (&x)[N][W]) {
  for (int w = 0; w < W; w++) IN_REGISTER(part[w]);
  for (int r = 0; r < N; r++) {
    const f32x16 each = splat(q[r * DP]);
    for (int w = 0; w < W; w++) x[r][w] = fma(each, part[w], x[r][w]);
  }
}
template <int W> struct ByColumn {  // keys as columns [D][16 W]: no sums over lanes
  const float* k;
  template <int N> void dot(const float* q, int, f32x16 (*s)[2]) const {
    f32x16 x[N][W] = {};
    for (int64_t d = 0; d < D; d++) {
      f32x16 part[W];
      for (int w = 0; w < W; w++) part[w] = load<f32x16>(k + (d * W + w) * 16);
      join<N, W>(q + d, part, x);
    }
    for (int r = 0; r < N; r++)
      for (int w = 0; w < W; w++) s[r][w] = x[r][w];
  }
};

// One tile of at most 32 tokens for the R heads of one query; `live` masks tokens, `bias` may be null. SPANS > 0:
// values are codes, and the columns of one span share a[span][n] and z[span][n] with value = a * code + z; the factors
// go to the weights instead.
template <int64_t SPANS, class Keys, class V>
__attribute__((noinline)) void tile(
    const float* q, const float* shift, const float* bias, const Keys& keys, const V& v, const float* a, const float* z,
    int count, uint32_t live, float softcap, float* acc, float* most, float* total) {
  constexpr bool PAIRS = R % HEADS > 1;
  constexpr int64_t MANY = SPANS ? SPANS : 1, SUMS = (R * (SPANS + 1) + 15) / 16 * 16;
  const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const int halves = (count + 15) / 16;
  alignas(64) float weight[R * MANY * 32], summed[SUMS];
  f32x16 s[R][2], parts[SUMS];  // summed over the tokens: each head's weights, then weight * z of its spans
  i32x16 mask[2];
  int64_t r = 0;
  for (; r + HEADS <= R; r += HEADS) keys.template dot<HEADS>(q + r * DP, halves, s + r);
  for (; PAIRS && r + 2 <= R; r += 2) keys.template dot<2>(q + r * DP, halves, s + r);
  for (; r < R; r++) keys.template dot<1>(q + r * DP, halves, s + r);
  for (int h = 0; h < halves; h++) mask[h] = -((((int32_t)(live >> (16 * h)) - i32x16{}) >> lane) & 1);
  for (r = 0; r < R; r++) {
    f32x16 highest = splat(-__builtin_inff());
    for (int h = 0; h < halves; h++) {
      s[r][h] += shift[r];
      if (softcap > 0) s[r][h] = tangent(s[r][h] / softcap) * softcap;
      if (bias) s[r][h] += load<f32x16>(bias + 16 * h);
      s[r][h] = choose(mask[h], s[r][h], splat(-__builtin_inff()));
      highest = larger(highest, s[r][h]);
    }
    float peak = top(highest), old = most[r];
    if (peak > old) {
      float shrink = decay(old - peak);
      most[r] = peak;
      total[r] *= shrink;
      for (int64_t e = 0; e < EP; e += 16) store(acc + r * EP + e, load<f32x16>(acc + r * EP + e) * shrink);
    }
    f32x16 mass = {}, offset[MANY] = {};
    peak = most[r];
    for (int h = 0; h < halves; h++) {
      f32x16 p = (f32x16)((i32x16)decay(s[r][h] - peak) & mask[h]);
      mass += p;
      if (SPANS == 0) store(weight + r * 32 + 16 * h, p);
      for (int64_t span = 0; span < SPANS; span++) {
        store(weight + (r * MANY + span) * 32 + 16 * h, p * load<f32x16>(a + 32 * span + 16 * h));
        offset[span] = fma(p, load<f32x16>(z + 32 * span + 16 * h), offset[span]);
      }
    }
    parts[r] = mass;
    for (int64_t span = 0; span < SPANS; span++) parts[R + r * SPANS + span] = offset[span];
  }
  for (int64_t i = R * (SPANS + 1); i < SUMS; i++) parts[i] = f32x16{};
  for (int64_t i = 0; i < SUMS; i += 16) store(summed + i, sums(parts + i));
  for (r = 0; r < R; r++) total[r] += summed[r];
  for (r = 0; r + HEADS <= R; r += HEADS)
    mix<SPANS, HEADS, 0>(weight + r * MANY * 32, summed + R + r * SPANS, v, count, acc + r * EP);
  for (; PAIRS && r + 2 <= R; r += 2)
    mix<SPANS, 2, 0>(weight + r * MANY * 32, summed + R + r * SPANS, v, count, acc + r * EP);
  for (; r < R; r++) mix<SPANS, 1, 0>(weight + r * MANY * 32, summed + R + r * SPANS, v, count, acc + r * EP);
}

// y = x m for a row of K numbers and a matrix [K][K]; K is a multiple of 16
template <int64_t K> static inline void spin(const float* x, const float* m, float* y) {
  for (int64_t c = 0; c < K; c += 16) {
    f32x16 sum = {};
    for (int64_t i = 0; i < K; i++) sum = fma(splat(x[i]), load<f32x16>(m + i * K + c), sum);
    store(y + c, sum);
  }
}
// Turns a row of a key by the cosines and sines of its position: column i < TURN with column i + TURN.
static inline void turn(float* key, const float* at) {
  constexpr int64_t whole = TURN / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16) {
    const f32x16 x = load<f32x16>(key + i), y = load<f32x16>(key + TURN + i);
    const f32x16 c = load<f32x16>(at + i), s = load<f32x16>(at + TURN + i);
    store(key + i, x * c - y * s), store(key + TURN + i, y * c + x * s);
  }
  for (int64_t i = whole; i < TURN; i++) {
    const float x = key[i], y = key[TURN + i], c = at[i], s = at[TURN + i];
    key[i] = x * c - y * s, key[TURN + i] = y * c + x * s;
  }
}
"""
