"""The C++ text of attention over segments; `attention_source.py` fills in the shapes and loaders of a cache site.

out[t] = Σ_s exp(scale · q[t] · k[s] - ℓ[t]) · v[s] with ℓ the log-sum-exp over the tokens that query t sees: sinks,
body, tail, and its new tokens. Float32 accumulation. A unit of work is a (row, KV head, chunk of tokens); it leaves a
maximum, a sum and a weighted value per query, and the last unit of a row and KV head merges them.

What a query reads is cut into tiles and chunks by its place in the query's own sequence: committed tail first, then the
new tokens it sees, in order. So the arithmetic of a query does not depend on how many other queries or tokens the step
brought, and a token verified in a tree gets the bits that it gets when decoded alone. `tile` must not be inlined: every
tile of a kind then runs the same instructions.
"""

from __future__ import annotations

from string import Template

KERNEL = Template("""\
namespace ${name}_of {
namespace {  // without linkage: a static in an inline function would be one for all kernels of the process
constexpr int64_t H = $heads, G = $groups, R = H / G, D = $key_dim, E = $value_dim, SINK = $sink, KEPT = $kept;
constexpr int64_t DP = (D + 15) / 16 * 16, EP = (E + 15) / 16 * 16;  // rows padded to whole vectors
constexpr int64_t TILE = 32, BODY = $body, CHUNK = $chunk, PAGES = $pages, QUERIES = $queries, WINDOW = $window;
constexpr int64_t STATE = QUERIES * R * (EP + 2);
typedef $dense dense;

static inline void key_row(const dense* x, float* y) {
$dense_keys
}
static inline void value_row(const dense* x, float* y) {
$dense_values
}

#ifdef __AVX512F__
constexpr int HEADS = 2, VECTORS = 4;  // accumulators that fit the registers
#else
constexpr int HEADS = 2, VECTORS = 2;
#endif

// acc[h] += add[h] + Σ_n weight[h][n] * v[n] for N heads, from column FIRST on; the columns of one span share weights
template <int64_t SPANS, int N, int64_t FIRST>
static inline void mix(const float* weight, const float* add, const float* const* v, int count, float* acc) {
  constexpr int64_t MANY = SPANS ? SPANS : 1, WIDE = EP / MANY;
  constexpr int W = EP - FIRST < 16 * VECTORS ? (EP - FIRST) / 16 : VECTORS;
  f32x16 o[N][W];
  for (int h = 0; h < N; h++)
    for (int w = 0; w < W; w++) {
      o[h][w] = load<f32x16>(acc + h * EP + FIRST + 16 * w);
      if (SPANS) o[h][w] += add[h * MANY + (FIRST + 16 * w) / WIDE];
    }
  for (int n = 0; n < count; n++)
    for (int w = 0; w < W; w++) {
      f32x16 x = load<f32x16>(v[n] + FIRST + 16 * w);
      for (int h = 0; h < N; h++) o[h][w] += weight[(h * MANY + (FIRST + 16 * w) / WIDE) * 32 + n] * x;
    }
  for (int h = 0; h < N; h++)
    for (int w = 0; w < W; w++) store(acc + h * EP + FIRST + 16 * w, o[h][w]);
  if constexpr (FIRST + 16 * W < EP) mix<SPANS, N, FIRST + 16 * W>(weight, add, v, count, acc);
}

// One tile of at most 32 tokens for the R heads of one query. k, v: rows; those from `count` up to whole vectors must
// be readable, `live` masks them. SPANS > 0: values are codes, and the columns of one span share a[span][n] and
// z[span][n] with value = a * code + z; the factors go to the weights instead.
template <int64_t SPANS>
__attribute__((noinline)) void tile(
    const float* q, const float* shift, const float* const* k, const float* const* v, const float* a, const float* z,
    int count, uint32_t live, float softcap, float* acc, float* most, float* total) {
  constexpr int64_t MANY = SPANS ? SPANS : 1, SUMS = (R * (SPANS + 1) + 15) / 16 * 16;
  const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const int halves = (count + 15) / 16;
  alignas(64) float weight[R * MANY * 32], summed[SUMS];
  f32x16 parts[SUMS] = {};  // what is summed over the tokens: the weights of each head, then weight * z of its spans
  for (int64_t r = 0; r < R; r++) {
    f32x16 s[2], highest = splat(-__builtin_inff());
    i32x16 mask[2];
    for (int h = 0; h < halves; h++) {
      f32x16 dots[16];
      for (int i = 0; i < 16; i++) {
        const float* row = k[16 * h + i];
        f32x16 x = load<f32x16>(q + r * DP) * load<f32x16>(row);
        for (int64_t d = 16; d < DP; d += 16) x += load<f32x16>(q + r * DP + d) * load<f32x16>(row + d);
        dots[i] = x;
      }
      s[h] = sums(dots) + shift[r];
      if (softcap > 0) s[h] = tangent(s[h] / softcap) * softcap;
      mask[h] = -((((int32_t)(live >> (16 * h)) - i32x16{}) >> lane) & 1);
      s[h] = choose(mask[h], s[h], splat(-__builtin_inff()));
      highest = larger(highest, s[h]);
    }
    float peak = top(highest), old = most[r];
    if (peak > old) {
      float shrink = decay(old - peak);
      most[r] = peak;
      total[r] *= shrink;
      for (int64_t e = 0; e < EP; e += 16) store(acc + r * EP + e, load<f32x16>(acc + r * EP + e) * shrink);
    }
    for (int h = 0; h < halves; h++) {
      f32x16 p = (f32x16)((i32x16)decay(s[h] - most[r]) & mask[h]);
      parts[r] += p;
      if (SPANS == 0) store(weight + r * 32 + 16 * h, p);
      for (int64_t span = 0; span < SPANS; span++) {
        store(weight + (r * MANY + span) * 32 + 16 * h, p * load<f32x16>(a + 32 * span + 16 * h));
        parts[R + r * SPANS + span] += p * load<f32x16>(z + 32 * span + 16 * h);
      }
    }
  }
  for (int64_t i = 0; i < SUMS; i += 16) store(summed + i, sums(parts + i));
  for (int64_t r = 0; r < R; r++) total[r] += summed[r];
  int64_t r = 0;
  for (; r + HEADS <= R; r += HEADS)
    mix<SPANS, HEADS, 0>(weight + r * MANY * 32, summed + R + r * SPANS, v, count, acc + r * EP);
  for (; r < R; r++) mix<SPANS, 1, 0>(weight + r * MANY * 32, summed + R + r * SPANS, v, count, acc + r * EP);
}

struct Rows {  // the rows of one tile, converted where they must be
  alignas(64) float kb[TILE * DP], vb[TILE * EP];
  const float *k[TILE], *v[TILE];
  void take(int i, const void* keys, const void* values, int64_t row) {
    const dense *key = (const dense*)keys + row * D, *value = (const dense*)values + row * E;
    if ($direct) {
      k[i] = (const float*)key, v[i] = (const float*)value;
      return;
    }
    key_row(key, kb + i * DP), value_row(value, vb + i * EP);
    k[i] = kb + i * DP, v[i] = vb + i * EP;
  }
  void pad(int count) {  // rows that vectors of tokens read but `live` masks
    for (int i = count; i % 16; i++) k[i] = k[0], v[i] = v[0];
  }
};

struct Unit {  // what one unit of work reads and writes
  const Buffers& at;
  const Call& call;
  int64_t b, g, t0, queries;
  alignas(64) float q[QUERIES][R][DP];
  const uint64_t* seen[QUERIES];
  int64_t oldest;  // no query of the unit sees a position below it
  bool chains;     // every query that is real sees all new tokens up to itself
  float *acc, *most, *total;

  Unit(const Buffers& at, const Call& call, int64_t b, int64_t g, int64_t t0, int64_t queries, float* state)
      : at(at), call(call), b(b), g(g), t0(t0), queries(queries), oldest(INT64_MAX), chains(true),
        acc(state), most(state + QUERIES * R * EP), total(most + QUERIES * R) {
    for (int64_t t = 0; t < queries; t++) {
      seen[t] = call.visible + (b * call.tokens + t0 + t) * ((call.tokens + 63) / 64);
      if (position(t) - WINDOW + 1 < oldest) oldest = position(t) - WINDOW + 1;
      if (real(t)) chains &= Seen(seen[t], (call.tokens + 63) / 64).count == t0 + t + 1;
      for (int64_t r = 0; r < R; r++) {
        const float* x = call.q + b * call.q_row + (g * R + r) * call.q_head + (t0 + t) * call.q_token;
        for (int64_t d = 0; d < D; d++) q[t][r][d] = x[d] * call.scale;
        for (int64_t d = D; d < DP; d++) q[t][r][d] = 0;
      }
    }
    for (int64_t i = 0; i < queries * R * EP; i++) acc[i] = 0;
    for (int64_t i = 0; i < queries * R; i++) most[i] = -__builtin_inff(), total[i] = 0;
  }
  int64_t position(int64_t t) const { return call.positions[b * call.tokens + t0 + t]; }
  bool real(int64_t t) const { return seen[t][(t0 + t) / 64] >> ((t0 + t) % 64) & 1; }
  const int32_t* counts() const { return at.counts + 4 * b; }

  void dense_tile(int64_t t, const Rows& rows, int count, uint32_t live) {
    static const float zeros[R] = {};
    if (live) see<0>(t, q[t][0], zeros, rows.k, rows.v, 0, 0, count, live);
  }
  template <int64_t SPANS>
  void see(int64_t t, const float* q, const float* shift, const float* const* k, const float* const* v, const float* a,
           const float* z, int count, uint32_t live) {
    tile<SPANS>(q, shift, k, v, a, z, count, live, call.softcap, acc + t * R * EP, most + t * R, total + t * R);
  }
  // tokens at consecutive positions from `first` on that query t still sees
  uint32_t within(int64_t t, int64_t first, int count) const {
    uint32_t live = ~0u >> (32 - count);
    if (!WINDOW) return live;
    int64_t gone = position(t) - WINDOW + 1 - first;
    return gone <= 0 ? live : gone >= count ? 0 : live & ~0u << gone;
  }

  void sink() {
    if (WINDOW && oldest >= SINK) return;
    Rows rows;
    for (int64_t first = 0; first < SINK; first += TILE) {
      int count = SINK - first < TILE ? SINK - first : TILE;
      for (int i = 0; i < count; i++) rows.take(i, at.sink_k, at.sink_v, (b * G + g) * SINK + first + i);
      rows.pad(count);
      for (int64_t t = 0; t < queries; t++)
        if (real(t)) dense_tile(t, rows, count, within(t, first, count));
    }
  }

$body_scan

  // Every query sees the new tokens up to itself: a tile has the same rows for all, and each reads what it sees.
  void chain(int64_t l, int64_t last) {
    Rows rows;
    const int64_t kept = counts()[2], start = counts()[3] - kept, most = kept + t0 + queries;
    for (const int64_t end = most < last ? most : last; l < end; l += TILE) {
      const int count = end - l < TILE ? end - l : TILE;
      for (int i = 0; i < count; i++) rows.take(i, at.tail_k, at.tail_v, (b * G + g) * at.width + l + i);
      rows.pad(count);
      for (int64_t t = 0; t < queries; t++) {
        const int64_t own = kept + t0 + t + 1 - l, sees = own < count ? own : count;
        if (sees > 0 && real(t)) dense_tile(t, rows, sees, within(t, start + l, sees));
      }
    }
  }

  void tail(int64_t first, int64_t last) {
    Rows rows;
    const int64_t kept = counts()[2], start = counts()[3] - kept, whole = kept / TILE * TILE;
    for (int64_t l = first; l < last && l < whole; l += TILE) {
      if (WINDOW && start + l + TILE <= oldest) continue;
      for (int i = 0; i < TILE; i++) rows.take(i, at.tail_k, at.tail_v, (b * G + g) * at.width + l + i);
      for (int64_t t = 0; t < queries; t++)
        if (real(t)) dense_tile(t, rows, TILE, within(t, start + l, TILE));
    }
    if (chains) return chain(first > whole ? first : whole, last);
    for (int64_t t = 0; t < queries; t++) {  // from the first tile on that new tokens share, each query has its own
      if (!real(t)) continue;
      Seen sees(seen[t], (call.tokens + 63) / 64);
      int64_t l = first > whole ? first : whole, end = kept + sees.count < last ? kept + sees.count : last;
      if (l >= end) continue;
      for (int64_t i = kept; i < l; i++) sees.next();
      for (; l < end; l += TILE) {
        int count = end - l < TILE ? end - l : TILE;
        uint32_t live = ~0u >> (32 - count);
        for (int i = 0; i < count; i++) {
          int64_t slot = l + i, place = start + l + i;
          if (slot >= kept) {
            int64_t j = sees.next();
            slot = kept + j, place = call.positions[b * call.tokens + j];
          }
          rows.take(i, at.tail_k, at.tail_v, (b * G + g) * at.width + slot);
          if (WINDOW && position(t) - place >= WINDOW) live &= ~(1u << i);
        }
        rows.pad(count);
        dense_tile(t, rows, count, live);
      }
    }
  }
};

static inline int64_t body_chunks(const int32_t* counts) {
  return (counts[1] / (KEPT ? KEPT : 1) + PAGES - 1) / PAGES;
}

// out [E] of one query (number `slot` of its block) and head, from what its chunks left
static inline void merge(const Call& call, int64_t h, int64_t slot, int64_t chunks, const float* states, float* out) {
  const int64_t in = slot * R + h % R;
  float most = -__builtin_inff(), total = 0;
  alignas(64) float mixed[EP] = {};
  bool real = false;
  for (int64_t c = 0; c < chunks; c++) {
    const float *state = states + c * STATE, m = state[QUERIES * R * EP + in];
    most = m > most ? m : most;
    real |= state[QUERIES * R * (EP + 1) + in] != 0;
  }
  if (real && call.sinks) {
    most = call.sinks[h] > most ? call.sinks[h] : most;
    total = decay(call.sinks[h] - most);
  }
  for (int64_t c = 0; c < chunks; c++) {
    const float *state = states + c * STATE, part = state[QUERIES * R * (EP + 1) + in];
    if (part == 0) continue;
    float factor = decay(state[QUERIES * R * EP + in] - most);
    total += part * factor;
    for (int64_t e = 0; e < EP; e += 16)
      store(mixed + e, load<f32x16>(mixed + e) + load<f32x16>(state + in * EP + e) * factor);
  }
  for (int64_t e = 0; e < E; e++) out[e] = real ? mixed[e] / total : 0;
}

static void run(Rank& rank, const Buffers& at, const Call& call) {
  int64_t chunks = 0;
  for (int64_t b = 0; b < at.rows; b++) {
    const int32_t* counts = at.counts + 4 * b;
    int64_t n = body_chunks(counts) + (counts[2] + call.tokens + CHUNK - 1) / CHUNK;
    chunks = n > chunks ? n : chunks;
  }
  const int64_t pairs = at.rows * G, blocks = (call.tokens + QUERIES - 1) / QUERIES;
  int32_t* finished = call.finished;  // done chunks of a block of queries, row and KV head; 0 between steps
  float* states = call.work;
  for (int64_t first = 0; first < blocks; first += call.blocks) {  // as many blocks at once as there is scratch for
    if (first) meet(rank);
    const int64_t held = blocks - first < call.blocks ? blocks - first : call.blocks;
    share(rank, held * pairs * chunks, [&](int64_t i) {
      const int64_t c = i % chunks, place = i / chunks, pair = place % pairs, b = pair / G, g = pair % G;
      const int64_t t0 = (first + place / pairs) * QUERIES;
      const int64_t queries = call.tokens - t0 < QUERIES ? call.tokens - t0 : QUERIES;
      const int64_t body = body_chunks(at.counts + 4 * b);
      Unit unit(at, call, b, g, t0, queries, states + i * STATE);
      if (c == 0 && SINK && at.counts[4 * b]) unit.sink();
      if (c < body) unit.body(c);
      else unit.tail((c - body) * CHUNK, (c - body + 1) * CHUNK);
      // whoever finishes the last chunk of a place merges them, always in their order: no meeting between the passes
      if (__atomic_add_fetch(&finished[place], 1, __ATOMIC_ACQ_REL) < chunks) return;
      __atomic_store_n(&finished[place], 0, __ATOMIC_RELAXED);
      for (int64_t h = g * R; h < (g + 1) * R; h++)
        for (int64_t slot = 0; slot < queries; slot++) {
          float* out = call.out + b * call.out_row + h * call.out_head + (t0 + slot) * call.out_token;
          merge(call, h, slot, chunks, states + place * chunks * STATE, out);
        }
    });
  }
}
}  // namespace
}  // namespace ${name}_of

static void $name(Rank& rank, const int64_t* c) { ${name}_of::run(rank, *(const Buffers*)c[1], *(const Call*)c[2]); }
""")

BODY = Template("""\
  void body(int64_t c) {
    constexpr int64_t SPANS = $spans;
    constexpr bool FOLD = $fold, SHIFT = $zero;  // the scale, and the zero, of a tile's keys go to the query
    const int64_t used = counts()[1] / KEPT, end = (c + 1) * PAGES < used ? (c + 1) * PAGES : used;
    alignas(64) float kb[BODY * DP], vb[BODY * EP], a[SPANS * 32 + 1] = {}, z[SPANS * 32 + 1] = {};
    alignas(64) float key_scale[DP], key_zero[DP], scaled[R][DP], shift[R] = {};
    const float *k[TILE], *v[TILE];
    for (int i = 0; i < TILE; i++) k[i] = kb + i % BODY * DP, v[i] = vb + i % BODY * EP;
    for (int64_t page = c * PAGES; page < end; page++) {
      const int64_t slice = (b * G + g) * at.pages + page;
$pointers
      for (int64_t j = 0; j < (KEPT + BODY - 1) / BODY; j++) {
        const int count = KEPT - j * BODY < BODY ? KEPT - j * BODY : BODY;
        const int32_t* place = WINDOW ? at.places + slice * KEPT + j * BODY : 0;
        if (WINDOW && place[count - 1] < oldest) continue;
        for (int64_t i = 0; i < count; i++) {
          const int64_t n = j * BODY + i;
          float *key = kb + i * DP, *value = vb + i * EP;
$decode
        }
$prepare
        for (int64_t t = 0; t < queries; t++) {
          if (!real(t)) continue;
          uint32_t live = ~0u >> (32 - count);
          if (WINDOW)
            for (int i = 0; i < count; i++)
              if (position(t) - place[i] >= WINDOW) live &= ~(1u << i);
          if (!live) continue;
          if (FOLD)
            for (int64_t r = 0; r < R; r++) {
              f32x16 constant = {};
              for (int64_t d = 0; d < DP; d += 16) {
                store(scaled[r] + d, load<f32x16>(q[t][r] + d) * load<f32x16>(key_scale + d));
                if (SHIFT) constant += load<f32x16>(q[t][r] + d) * load<f32x16>(key_zero + d);
              }
              if (SHIFT) shift[r] = sum(constant);
            }
          see<SPANS>(t, FOLD ? scaled[0] : q[t][0], shift, k, v, a, z, count, live);
        }
      }
    }
  }""")

EMPTY_BODY = "  void body(int64_t) {}"
