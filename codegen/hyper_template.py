"""The C++ text of HyperAttention over a prompt in the tail of a cache site; `hyper.py` fills in shapes and binds it.

Meaning and order of parts: `ir/cache/hyper.py`. A unit of work is a block of queries of one head: it gathers them, and
streams keys and values through tiles of 32, of which the keys lie transposed, so that a vector holds 32 tokens' logits
of a query without a sum across lanes. `out` holds the mixed values so far and `state` their maximum and sum; parts come
one after the other (exact, then rectangles from the smallest on), so a query's result does not depend on the ranks.
"""

from __future__ import annotations

from string import Template

KERNEL = Template("""\
namespace ${name}_of {
namespace {  // without linkage: a static in an inline function would be one for all kernels of the process
constexpr int64_t H = $heads, G = $groups, R = H / G, D = $key_dim, E = $value_dim;
constexpr int64_t DP = (D + 15) / 16 * 16, EP = (E + 15) / 16 * 16;  // rows padded to whole vectors
constexpr int64_t BLOCK = $block, SAMPLE = $sample, SINK = $sink, BITS = $bits, WIDE = (BITS + 7) / 8 * 8, TILE = 32;
#ifdef __AVX512F__
constexpr int MANY = 8, FEW = 4, VECTORS = 4;  // queries of a product with keys, with values: what registers hold
#else
constexpr int MANY = 2, FEW = 2, VECTORS = 2;
#endif
constexpr int64_t QUERIES = (BLOCK + 7) / 8 * 8;
typedef $dense dense;

static inline void key_row(const dense* x, float* y) {
$dense_keys
}
static inline void value_row(const dense* x, float* y) {
$dense_values
}

struct Piece { int32_t row, first, middle, end, level; };                  // a rectangle of one row
struct Part { int32_t row, first, middle, end, level, block, blocks; };    // one of its blocks
struct Given {
  const float* q;                // [B, H, T, D] by these strides; D is contiguous
  int64_t q_row, q_head, q_token;
  float* out;                    // [B, H, T, E] likewise
  int64_t out_row, out_head, out_token;
  const dense *keys, *values;    // [B, G, W, D], [B, G, W, E]: the tail, whose first slots hold the prompt
  int64_t width, tokens, rows;   // W, T, B
  const double* planes;          // [D, WIDE]
  const int32_t* lengths;        // [B]
  uint16_t* codes;               // [B, H + G, T]: buckets of queries, then of keys
  int32_t* orders;               // [levels, B, H + G, T]: tokens of a rectangle's two sides by bucket
  float* state;                  // [B, H, T, 2]: maximum and sum
  const int32_t* exact;          // [count, 3]: row, first key, first query of a block
  const Piece* pieces;
  const Part* parts;             // by level
  const int32_t* until;          // [levels]: how many parts there are up to and with a level
  const int32_t* starts;         // [B, blocks of T]: first key that a block of queries reads exactly
  int64_t exacts, pieces_count, levels;
  float scale;
  uint32_t key;
};

static inline uint32_t scramble(uint32_t x) {
  x = (x ^ x >> 16) * 0x7FEB352Du;
  x = (x ^ x >> 15) * 0x846CA68Bu;
  return x ^ x >> 16;
}
static inline uint32_t drawn(uint32_t word, uint32_t counter) { return scramble(word + (counter + 1) * 0x9E3779B9u); }

static inline const float* query(const Given& at, int64_t b, int64_t h, int64_t t) {
  return at.q + b * at.q_row + h * at.q_head + t * at.q_token;
}

template <class T> static inline uint16_t bucket(const Given& at, const T* x) {  // sums in float64, as the reference
  double sums[WIDE] = {};
  for (int64_t d = 0; d < D; d++)
    for (int64_t p = 0; p < WIDE; p++) sums[p] += (double)x[d] * at.planes[d * WIDE + p];
  uint32_t code = 0;
  for (int64_t p = 0; p < BITS; p++) code |= (uint32_t)(sums[p] > 0) << p;
  for (int shift = 1; shift < 16; shift *= 2) code ^= code >> shift;
  return code;
}
static void hash(const Given& at, int64_t b, int64_t i, int64_t t) {
  uint16_t* code = at.codes + (b * (H + G) + i) * at.tokens + t;
  if (i < H) {
    *code = bucket(at, query(at, b, i, t));
    return;
  }
  alignas(64) float row[DP];
  key_row(at.keys + ((b * G + i - H) * at.width + t) * D, row);
  *code = bucket(at, row);
}
static void order(const Given& at, const Piece& p, int64_t i) {  // stable, by counting
  const int64_t first = i < H ? p.middle : p.first, end = i < H ? p.end : p.middle;
  const uint16_t* codes = at.codes + (p.row * (H + G) + i) * at.tokens;
  int32_t* to = at.orders + ((p.level * at.rows + p.row) * (H + G) + i) * at.tokens;
  int32_t place[(1 << BITS) + 1] = {};
  for (int64_t t = first; t < end; t++) place[codes[t] + 1]++;
  for (int64_t c = 1; c <= 1 << BITS; c++) place[c] += place[c - 1];
  for (int64_t t = first; t < end; t++) to[first + place[codes[t]]++] = t;
}

// s[i] = q[i] . k[n] for N queries and the 32 tokens of a tile, whose keys lie by column
template <int N> static inline void products(const float* q, const float* keys, f32x16 (*s)[2]) {
  f32x16 o[N][2] = {};
  for (int64_t d = 0; d < D; d++) {
    const f32x16 low = load<f32x16>(keys + d * TILE), high = load<f32x16>(keys + d * TILE + 16);
    for (int i = 0; i < N; i++) {
      const f32x16 x = splat(q[i * DP + d]);
      o[i][0] += x * low, o[i][1] += x * high;
    }
  }
  for (int i = 0; i < N; i++) s[i][0] = o[i][0], s[i][1] = o[i][1];
}
// acc[i] += sum over n of weight[i][n] * v[n] for N queries, from column FIRST on
template <int N, int64_t FIRST> static inline void mix(const float* weight, const float* v, int count, float* acc) {
  constexpr int W = EP - FIRST < 16 * VECTORS ? (EP - FIRST) / 16 : VECTORS;
  f32x16 o[N][W];
  for (int i = 0; i < N; i++)
    for (int w = 0; w < W; w++) o[i][w] = load<f32x16>(acc + i * EP + FIRST + 16 * w);
  for (int n = 0; n < count; n++)
    for (int w = 0; w < W; w++) {
      const f32x16 x = load<f32x16>(v + n * EP + FIRST + 16 * w);
      for (int i = 0; i < N; i++) o[i][w] += weight[i * TILE + n] * x;
    }
  for (int i = 0; i < N; i++)
    for (int w = 0; w < W; w++) store(acc + i * EP + FIRST + 16 * w, o[i][w]);
  if constexpr (FIRST + 16 * W < EP) mix<N, FIRST + 16 * W>(weight, v, count, acc);
}

struct Block {  // a block of queries with what it has seen
  const Given& at;
  int64_t b, h, count;
  const dense *k, *v;
  alignas(64) float q[QUERIES * DP], acc[QUERIES * EP], keys[DP * TILE], values[TILE * EP];
  alignas(64) float total[QUERIES][16];
  float most[QUERIES];
  int32_t who[QUERIES], limit[QUERIES];  // token; it sees keys in front of its limit

  // a token each from `token(i)`; `fresh`: nothing was seen so far
  template <class Token> Block(const Given& at, int64_t b, int64_t h, int64_t count, bool fresh, Token token)
      : at(at), b(b), h(h), count(count) {
    k = at.keys + (b * G + h / R) * at.width * D, v = at.values + (b * G + h / R) * at.width * E;
    for (int64_t i = 0; i < QUERIES; i++) {
      for (int64_t d = 0; d < DP; d++) q[i * DP + d] = 0;
      for (int64_t e = 0; e < EP; e++) acc[i * EP + e] = 0;
      for (int lane = 0; lane < 16; lane++) total[i][lane] = 0;
      most[i] = -__builtin_inff(), limit[i] = INT32_MIN;
      if (i >= count) continue;
      const int64_t t = who[i] = token(i);
      const float* x = query(at, b, h, t);
      for (int64_t d = 0; d < D; d++) q[i * DP + d] = x[d] * at.scale;
      if (fresh) continue;
      const float *mixed = result(t), *held = state(t);
      most[i] = held[0], total[i][0] = held[1];
      for (int64_t e = 0; e < E; e++) acc[i * EP + e] = mixed[e] * held[1];
    }
  }
  float* result(int64_t t) { return at.out + b * at.out_row + h * at.out_head + t * at.out_token; }
  float* state(int64_t t) { return at.state + ((b * H + h) * at.tokens + t) * 2; }

  // `many` tokens, of which `token(n)` is the n-th, each with `bias(n)` on its logit
  template <class Token, class Bias> void see(int64_t many, Token token, Bias bias) {
    for (int64_t n = 0; n < many; n += TILE) {
      const int here = many - n < TILE ? many - n : TILE;
      alignas(64) int32_t place[TILE];
      alignas(64) float extra[TILE];
      alignas(64) float rows[TILE * DP];
      int32_t highest = INT32_MIN;
      for (int i = 0; i < TILE; i++) {
        const int64_t t = token(n + (i < here ? i : 0));
        place[i] = i < here ? t : INT32_MAX, extra[i] = i < here ? bias(n + i) : -__builtin_inff();
        if (place[i] > highest) highest = place[i];
        key_row(k + t * D, rows + i * DP);
        if (i < here) value_row(v + t * E, values + i * EP);
      }
      for (int64_t d = 0; d < D; d++)
        for (int i = 0; i < TILE; i++) keys[d * TILE + i] = rows[i * DP + d];
      tile(here, load<i32x16>(place), load<i32x16>(place + 16), load<f32x16>(extra), load<f32x16>(extra + 16), highest);
    }
  }
  __attribute__((noinline)) void tile(int here, i32x16 low, i32x16 high, f32x16 bias, f32x16 more, int32_t highest) {
    const f32x16 none = splat(-__builtin_inff());
    alignas(64) float weight[MANY * TILE];
    for (int64_t i = 0; i < count; i += MANY) {
      f32x16 s[MANY][2];
      products<MANY>(q + i * DP, keys, s);
      for (int j = 0; j < MANY; j++) {
        f32x16 a = s[j][0] + bias, c = s[j][1] + more;
        if (limit[i + j] <= highest) {
          const i32x16 bound = limit[i + j] - i32x16{};
          a = choose(low < bound, a, none), c = choose(high < bound, c, none);
        }
        const float peak = top(larger(a, c));
        if (peak > most[i + j]) {
          const float shrink = decay(most[i + j] - peak);
          most[i + j] = peak;
          store(total[i + j], load<f32x16>(total[i + j]) * shrink);
          for (int64_t e = 0; e < EP; e += 16) {
            float* held = acc + (i + j) * EP + e;
            store(held, load<f32x16>(held) * shrink);
          }
        }
        const f32x16 zero = {}, p = choose(a > none, decay(a - most[i + j]), zero),
                     r = choose(c > none, decay(c - most[i + j]), zero);
        store(total[i + j], load<f32x16>(total[i + j]) + p + r);
        store(weight + j * TILE, p), store(weight + j * TILE + 16, r);
      }
      for (int j = 0; j < MANY; j += FEW) mix<FEW, 0>(weight + j * TILE, values, here, acc + (i + j) * EP);
    }
  }
  void finish() {
    for (int64_t i = 0; i < count; i++) {
      const float seen = sum(load<f32x16>(total[i]));
      float *to = result(who[i]), *held = state(who[i]);
      held[0] = most[i], held[1] = seen;
      for (int64_t e = 0; e < E; e++) to[e] = acc[i * EP + e] / seen;
    }
  }
};

static inline int64_t start_of(const Given& at, int64_t b, int64_t t) {
  return at.starts[b * ((at.tokens + BLOCK - 1) / BLOCK) + t / BLOCK];
}

static void exact(const Given& at, const int32_t* unit, int64_t h) {
  const int64_t b = unit[0], first = unit[1], t = unit[2];
  const int64_t left = at.lengths[b] - t, count = left < BLOCK ? left : BLOCK;
  Block block(at, b, h, count, true, [&](int64_t i) { return t + i; });
  for (int64_t i = 0; i < count; i++) block.limit[i] = t + i + 1;
  auto none = [](int64_t) { return 0.0f; };
  block.see(first < SINK ? first : SINK, [](int64_t n) { return n; }, none);
  block.see(t + count - first, [&](int64_t n) { return first + n; }, none);
  block.finish();
}

static void approximate(const Given& at, const Part& p, int64_t h) {
  const int32_t* orders = at.orders + (p.level * at.rows + p.row) * (H + G) * at.tokens;
  const int32_t *mine = orders + h * at.tokens + p.middle, *keys = orders + (H + h / R) * at.tokens + p.first;
  const int64_t asked = p.end - p.middle, keys_count = p.middle - p.first;
  const int64_t rank = (p.block * asked + p.blocks - 1) / p.blocks;
  const int64_t last = ((p.block + 1) * asked + p.blocks - 1) / p.blocks;
  if (rank == last) return;
  Block block(at, p.row, h, last - rank, false, [&](int64_t i) { return mine[rank + i]; });
  for (int64_t i = 0; i < last - rank; i++) block.limit[i] = start_of(at, p.row, mine[rank + i]);
  const int64_t low = p.block * BLOCK, high = low + BLOCK < keys_count ? low + BLOCK : keys_count;
  const int64_t outside = keys_count - (high - low), many = outside < SAMPLE ? outside : SAMPLE;
  block.see(high - low, [&](int64_t n) { return keys[low + n]; }, [](int64_t) { return 0.0f; });
  if (many) {
    const float bias = logf((float)outside / many);
    const uint32_t word = drawn(drawn(drawn(drawn(scramble(at.key), 2), h), p.middle), p.block);
    block.see(many, [&](int64_t n) {
      const int64_t r = (((n << 24) + (drawn(word, n) >> 8)) * outside / many) >> 24;
      return keys[r < low ? r : r + high - low];
    }, [&](int64_t) { return bias; });
  }
  block.finish();
}

static void run(Rank& rank, const Given& at) {
  constexpr int64_t SOME = 64;  // tokens that are hashed at once
  const int64_t runs = (at.tokens + SOME - 1) / SOME, sides = H + G;
  if (at.pieces_count) share(rank, at.rows * sides * runs, [&](int64_t i) {
    const int64_t b = i / runs / sides, first = i % runs * SOME;
    const int64_t end = first + SOME < at.lengths[b] ? first + SOME : at.lengths[b];
    for (int64_t t = first; t < end; t++) hash(at, b, i / runs % sides, t);
  });
  if (at.pieces_count) meet(rank);
  share(rank, at.exacts * H, [&](int64_t i) { exact(at, at.exact + 3 * (i / H), i % H); });
  share(rank, at.pieces_count * sides, [&](int64_t i) { order(at, at.pieces[i / sides], i % sides); });
  share(rank, at.rows * H, [&](int64_t i) {  // padding
    for (int64_t t = at.lengths[i / H]; t < at.tokens; t++)
      memset(at.out + i / H * at.out_row + i % H * at.out_head + t * at.out_token, 0, E * sizeof(float));
  });
  for (int64_t level = 0, from = 0; level < at.levels; from = at.until[level++]) {
    meet(rank);
    share(rank, (at.until[level] - from) * H, [&](int64_t i) { approximate(at, at.parts[from + i / H], i % H); });
  }
}
}  // namespace
}  // namespace ${name}_of

static void $name(Rank& rank, const int64_t* c) { ${name}_of::run(rank, *(const ${name}_of::Given*)c[1]); }
""")
