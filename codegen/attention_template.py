"""The C++ text of attention over segments; `attention_source.py` fills in the shapes and loaders of a cache site.

out[t] = Σ_s exp(scale · q[t] · k[s] + bias[s] - ℓ[t]) · v[s] with ℓ the log-sum-exp over the tokens that query t sees:
sinks, bodies, tail, and its new tokens. Float32 accumulation. A unit of work is a (row, KV head, chunk of tokens); it
leaves a maximum, a sum and a weighted value per query, and the last unit of a row and KV head merges them. Heads may
hold different numbers of pages: what is beyond a head's last chunk returns at once.

What a query reads is cut into tiles and chunks by its place in the query's own sequence: pages of each body as they lie
or as the query's list names them, then the committed tail, then the new tokens it sees, in order. So the arithmetic of
a query does not depend on how many other queries or tokens the step brought, and a token verified in a tree gets the
bits that it gets when decoded alone.
"""

from __future__ import annotations

from string import Template

KERNEL = Template("""\
namespace ${name}_of {
namespace {  // without linkage: a static in an inline function would be one for all kernels of the process
constexpr int64_t H = $heads, G = $groups, R = H / G, D = $key_dim, E = $value_dim, SINK = $sink, TURN = $turn;
constexpr int64_t DP = (D + 15) / 16 * 16, EP = (E + 15) / 16 * 16;  // rows padded to whole vectors
constexpr int64_t TILE = 32, CHUNK = $chunk, QUERIES = $queries, WINDOW = $window, BODIES = $bodies;
constexpr int64_t STATE = QUERIES * R * (EP + 2);
constexpr bool STREAM = $stream;
constexpr int64_t PER[] = {$per}, LISTED[] = {$listed};  // pages, and entries of lists, of each body that make a chunk
constexpr bool TURNED_SINK = $turned_sink;  // sinks are kept as they were before the turn
typedef $dense dense;

static inline void key_row(const dense* x, float* y) {
$dense_keys
}
static inline void value_row(const dense* x, float* y) {
$dense_values
}

$tile
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
  float* own(int i) {  // row i of the keys, where it may be written
    if ($direct) memcpy(kb + i * DP, k[i], sizeof(float) * DP);
    k[i] = kb + i * DP;
    return kb + i * DP;
  }
  void pad(int count) {  // rows that vectors of tokens read but `live` masks
    for (int i = count; i % 16; i++) k[i] = k[0], v[i] = v[0];
  }
};

$held
// Chunks of a body that the queries of a unit read: of the head's pages, or of the longest of their lists.
static inline int64_t chunks_of(const Buffers& at, const Call& call, int64_t i, int64_t b, int64_t g, int64_t t0,
                                int64_t queries) {
  const Pages& in = at.bodies[i];
  int64_t entries = in.picks ? 0 : in.held[b * G + g];
  for (int64_t t = t0; in.picks && t < t0 + queries; t++) {
    const int64_t n = in.picked[(b * call.tokens + t) * G + g];
    entries = n > entries ? n : entries;
  }
  const int64_t each = in.picks ? LISTED[i] : PER[i];
  return (entries + each - 1) / each;
}
static inline int64_t chunks_of(const Buffers& at, const Call& call, int64_t b, int64_t g, int64_t t0,
                                int64_t queries) {
  int64_t n = (at.counts[4 * b + 2] + call.tokens + CHUNK - 1) / CHUNK;
  for (int64_t i = 0; i < BODIES; i++) n += chunks_of(at, call, i, b, g, t0, queries);
  return n;
}

struct Unit {  // what one unit of work reads and writes
  const Buffers& at;
  const Call& call;
  int64_t b, g, t0, queries;
  alignas(64) float q[QUERIES][R][DP];
  const uint64_t* seen[QUERIES];
  int64_t oldest;  // no query of the unit sees a position below it
  bool chains;     // every query that is real sees all new tokens up to itself
  float *acc, *most, *total;
  alignas(64) float padded[TILE] = {};

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

  template <int64_t SPANS, class Keys, class V>
  void see(int64_t t, const float* q, const float* shift, const float* bias, const Keys& k, const V& v, const float* a,
           const float* z, int count, uint32_t live) {
    float *x = acc + t * R * EP, *m = most + t * R, *sum = total + t * R;
    if (live) tile<SPANS>(q, shift, bias, k, v, a, z, count, live, call.softcap, x, m, sum);
  }
  void dense_tile(int64_t t, const Rows& rows, int count, uint32_t live, const float* bias = 0) {
    static const float zeros[R] = {};
    see<0>(t, q[t][0], zeros, bias, ByRow{rows.k}, Values{rows.v}, 0, 0, count, live);
  }
  // tokens at consecutive positions from `first` on that query t still sees
  uint32_t within(int64_t t, int64_t first, int count) const {
    uint32_t live = ~0u >> (32 - count);
    if (!WINDOW) return live;
    int64_t gone = position(t) - WINDOW + 1 - first;
    return gone <= 0 ? live : gone >= count ? 0 : live & ~0u << gone;
  }
  uint32_t within(int64_t t, const int32_t* places, int count) const {  // tokens at any positions
    uint32_t live = ~0u >> (32 - count);
    if (WINDOW)
      for (int i = 0; i < count; i++)
        if (position(t) - places[i] >= WINDOW) live &= ~(1u << i);
    return live;
  }

  float* biases(const float* x, int count) {  // where whole vectors may be read
    memcpy(padded, x, count * sizeof(float));
    return padded;
  }

  const float* spun(float* into, const float* matrix) const {  // all queries times a rotation
    for (int64_t t = 0; t < queries; t++)
      for (int64_t r = 0; r < R; r++) spin<D>(q[t][r], matrix, into + (t * R + r) * DP);
    return into;
  }
  void unspin(const float* matrix) {  // what was read so far times a rotation
    alignas(64) float row[EP];
    for (int64_t i = 0; i < queries * R; i++) {
      spin<E>(acc + i * EP, matrix, row);
      memcpy(acc + i * EP, row, sizeof row);
    }
  }

  void sink() {
    const int64_t place = at.sink_at ? at.sink_at[b * G + g] : 0;
    if (WINDOW && oldest >= place + SINK) return;
    Rows rows;
    for (int64_t first = 0; first < SINK; first += TILE) {
      int count = SINK - first < TILE ? SINK - first : TILE;
      for (int i = 0; i < count; i++) {
        rows.take(i, at.sink_k, at.sink_v, (b * G + g) * SINK + first + i);
        if (TURNED_SINK) turn(rows.own(i), at.turns + 2 * TURN * (place + first + i));
      }
      rows.pad(count);
      for (int64_t t = 0; t < queries; t++)
        if (real(t)) dense_tile(t, rows, count, within(t, place + first, count));
    }
  }

$scans

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

  void scan(int64_t c) {  // chunk c of all that the unit's queries read
$dispatch
    tail(c * CHUNK, (c + 1) * CHUNK);
  }
};

// out [E] of one query (number `slot` of its block) and head from what its chunks left
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

// The ranks do each(place, c) for the chunks c < own(place) of all places: who is free takes the next, or, with STREAM,
// every rank has an equal run of them (Lean Attention, 2024, arXiv 2405.10480). What is computed is the same.
template <class Own, class F> static inline void divide(Rank& rank, int64_t places, int64_t most, Own own, F each) {
  if (!STREAM) return share(rank, places * most, [&](int64_t i) {
    if (i % most < own(i / most)) each(i / most, i % most);
  });
  int64_t all = 0, before = 0, place = 0;
  for (int64_t p = 0; p < places; p++) all += own(p);
  const int64_t end = all * (rank.number + 1) / rank.team->size;
  for (int64_t i = all * rank.number / rank.team->size; i < end; i++) {
    for (int64_t n; i - before >= (n = own(place)); place++) before += n;
    each(place, i - before);
  }
}

static void run(Rank& rank, const Buffers& at, const Call& call) {
  const int64_t pairs = at.rows * G, blocks = (call.tokens + QUERIES - 1) / QUERIES;
  int64_t chunks = 0;
  for (int64_t pair = 0; pair < pairs; pair++) {
    const int64_t n = chunks_of(at, call, pair / G, pair % G, 0, call.tokens);
    chunks = n > chunks ? n : chunks;
  }
  int32_t* finished = call.finished;  // done chunks of a block of queries, row and KV head; 0 between steps
  float* states = call.work;
  for (int64_t first = 0; first < blocks; first += call.blocks) {  // as many blocks at once as there is scratch for
    if (first) meet(rank);
    const int64_t held = blocks - first < call.blocks ? blocks - first : call.blocks;
    const auto block = [&](int64_t place) { return (first + place / pairs) * QUERIES; };
    const auto many = [&](int64_t t0) { return call.tokens - t0 < QUERIES ? call.tokens - t0 : QUERIES; };
    const auto owned = [&](int64_t place) {
      const int64_t pair = place % pairs, t0 = block(place);
      return chunks_of(at, call, pair / G, pair % G, t0, many(t0));
    };
    divide(rank, held * pairs, chunks, owned, [&](int64_t place, int64_t c) {
      const int64_t pair = place % pairs, b = pair / G, g = pair % G, t0 = block(place), queries = many(t0);
      const int64_t own = owned(place);
      Unit unit(at, call, b, g, t0, queries, states + (place * chunks + c) * STATE);
      unit.scan(c);
      if (c == 0 && SINK && at.counts[4 * b]) unit.sink();
      // whoever finishes the last chunk of a place merges them, always in their order: no meeting between the passes
      if (__atomic_add_fetch(&finished[place], 1, __ATOMIC_ACQ_REL) < own) return;
      __atomic_store_n(&finished[place], 0, __ATOMIC_RELAXED);
      for (int64_t h = g * R; h < (g + 1) * R; h++)
        for (int64_t slot = 0; slot < queries; slot++) {
          float* out = call.out + b * call.out_row + h * call.out_head + (t0 + slot) * call.out_token;
          merge(call, h, slot, own, states + place * chunks * STATE, out);
        }
    });
  }
}
}  // namespace
}  // namespace ${name}_of

static void $name(Rank& rank, const int64_t* c) { ${name}_of::run(rank, *(const Buffers*)c[1], *(const Call*)c[2]); }
""")
