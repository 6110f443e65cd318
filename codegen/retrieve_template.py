"""The C++ texts that list what a query reads of a cache body; `retrieve.py` fills in a site's shapes and loader.

Both give every entry of the body a score, and take the best of them, of equal ones the older: pages by the bounds of
their keys for each KV head (Quest, arXiv:2406.10774), or tokens by the shares that all query heads give them together
(TokenSelect, arXiv:2411.02886; TidalDecode, arXiv:2410.05076). Every new token is scored by arithmetic of its own, cut
by places in the body, so that it gets the same list alone and among others.
"""

from __future__ import annotations

from string import Template

PAGES = Template("""\
namespace ${name}_of {
namespace {
using namespace lists;
constexpr i64 H = $heads, G = $groups, R = H / G, D = $dim, DP = (D + 15) / 16 * 16, MOST = $most, CHUNK = 128;
constexpr i64 QUERIES = $queries, CAP = $cap, WINDOW = $window;  // 0: none

static inline void bound_row(const uint16_t* x, float* y) {
$bound_row
}
// Of 16 pages the greatest that Σ max(q · low, q · high) is for a head of the group; up, down: max(q, 0) and min(q, 0)
__attribute__((noinline)) f32x16 bounds(const float* up, const float* down, const float* low, const float* high) {
  f32x16 most = splat(-__builtin_inff());
  for (i64 r = 0; r < R; r++) {
    f32x16 dots[16];
    for (int i = 0; i < 16; i++) {
      f32x16 x = {};
      for (i64 d = 0; d < DP; d += 16) {
        x = fma(load<f32x16>(up + r * DP + d), load<f32x16>(high + i * DP + d), x);
        x = fma(load<f32x16>(down + r * DP + d), load<f32x16>(low + i * DP + d), x);
      }
      dots[i] = x;
    }
    most = larger(most, sums(dots));
  }
  return most;
}
static inline int32_t* scores(const Lookup& at, i64 b, i64 slot) {
  return (int32_t*)(at.work + (slot * at.rows + b) * at.state);
}
// The first page with a token that the window shows to a new token
static i64 reach(const Lookup& at, i64 b, i64 t, i64 g) {
  if (!WINDOW) return 0;
  const int32_t* table = at.table + (b * G + g) * at.columns;
  i64 low = 0, high = at.held[b * G + g];
  while (low < high) {
    const i64 page = (low + high) / 2, slot = table[page], n = at.pages[2 * slot] - 1;
    const i64 last = at.places ? at.places[slot * CAP + n] : at.pages[2 * slot + 1] + n;
    if (at.positions[b * at.tokens + t] - last < WINDOW) high = page;
    else low = page + 1;
  }
  return low;
}
static void score(const Lookup& at, i64 first, i64 many, i64 b, i64 g, i64 c) {
  const i64 held = at.held[b * G + g], end = (c + 1) * CHUNK < held ? (c + 1) * CHUNK : held;
  i64 from[QUERIES], least = held;
  for (i64 t = 0; t < many; t++) {
    from[t] = reach(at, b, first + t, g);
    least = from[t] < least ? from[t] : least;
  }
  if (held - least <= MOST || least >= end) return;
  alignas(64) float up[QUERIES][R][DP], down[QUERIES][R][DP], low[16 * DP], high[16 * DP];
  for (i64 t = 0; t < many; t++)
    for (i64 r = 0; r < R; r++) {
      const float* q = at.query(b, g * R + r, first + t);
      for (i64 d = 0; d < DP; d += 16) {
        const f32x16 x = read(q + d, D - d);
        store(up[t][r] + d, choose(x < 0.0f, f32x16{}, x)), store(down[t][r] + d, choose(x < 0.0f, x, f32x16{}));
      }
    }
  const int32_t* table = at.table + (b * G + g) * at.columns;
  for (i64 page = c * CHUNK > least ? c * CHUNK : least / 16 * 16; page < end; page += 16) {
    for (i64 i = 0; i < 16; i++) {
      const i64 slot = table[page + i < end ? page + i : end - 1];
      bound_row((const uint16_t*)at.parts[0] + slot * D, low + i * DP);
      bound_row((const uint16_t*)at.parts[1] + slot * D, high + i * DP);
    }
    for (i64 t = 0; t < many; t++) {
      const i32x16 place = LANE + (int32_t)page, real = (place < (int32_t)end) & (place >= (int32_t)from[t]);
      const i32x16 s = ordered(bounds(up[t][0], down[t][0], low, high));
      store_scores(scores(at, b, t) + g * (at.state / G) + page, (s & real) | (NEVER & ~real));
    }
  }
}
static void choose_pages(const Lookup& at, i64 b, i64 t, i64 g, i64 slot) {
  const i64 held = at.held[b * G + g], from = reach(at, b, t, g);
  int32_t* out = at.list(b, t, g, G);
  const int32_t* x = scores(at, b, slot) + g * (at.state / G);
  const bool few = held - from <= MOST;
  at.count[(b * at.tokens + t) * G + g] = few ? all(from, held, out) : best_from(x, from, held, MOST, out);
}
}  // namespace
}  // namespace ${name}_of

static void $name(Rank& rank, const int64_t* c) {
  using namespace ${name}_of;
  const Lookup& at = *(const Lookup*)c[1];
  i64 longest = 0;
  for (i64 i = 0; i < at.rows * G; i++) longest = at.held[i] > longest ? at.held[i] : longest;
  const i64 chunks = longest > MOST ? (longest + CHUNK - 1) / CHUNK : 0, block = chunks ? at.block : at.tokens;
  for (i64 first = 0; first < at.tokens; first += block) {
    const i64 many = at.tokens - first < block ? at.tokens - first : block;
    if (first) meet(rank);  // the scratch is read no more
    share(rank, at.rows * G * chunks, [&](i64 i) {
      score(at, first, many, i / chunks / G, i / chunks % G, i % chunks);
    });
    if (chunks) meet(rank);
    share(rank, at.rows * G, [&](i64 i) {
      for (i64 t = 0; t < many; t++) choose_pages(at, i / G, first + t, i % G, t);
    });
  }
}
""")

TOKENS = Template("""\
namespace ${name}_of {
namespace {
using namespace lists;
constexpr i64 H = $heads, G = $groups, R = H / G, D = $dim, DP = (D + 15) / 16 * 16, HP = (H + 15) / 16 * 16;
constexpr i64 CAP = $cap, MOST = $most, CHUNK = $chunk, TURNED = $turned, QUERIES = $queries, WINDOW = $window;
constexpr bool DIRECT = $direct;  // keys are read as they lie, else decoded to floats first
constexpr i64 VECTORS = DP / 16, HEADS = VECTORS <= 4 && R % 4 == 0 ? 4 : R % 2 ? 1 : 2;  // of q that stay in registers
constexpr i64 AHEAD = 256;        // tokens between what is read and what memory is asked for
typedef $dense dense;

// The key of token n of a slot, as it is read
static inline void key_row(const Lookup& at, i64 g, i64 slot, i64 n, float* key) {
$pointers
$decode
  if (TURNED) {
    const i64 place = at.places ? at.places[slot * CAP + n] : at.pages[2 * slot + 1] + n;
    const float* turn = at.turns + place * 2 * TURNED;
    for (i64 d = 0; d < TURNED; d++) {
      const float x = key[d], y = key[d + TURNED];
      key[d] = x * turn[d] - y * turn[TURNED + d], key[d + TURNED] = y * turn[d] + x * turn[TURNED + d];
    }
  }
}
static inline f32x16 vector(const dense* x) { return $vector; }

// out[r] = q[r] · 16 keys, for the heads of a group
__attribute__((noinline)) void logits(const float* q, const dense* const* keys, float* out) {
  f32x16 dots[HEADS][16];
  for (i64 r = 0; r < R; r += HEADS) {
    f32x16 held[HEADS][VECTORS];
    for (i64 h = 0; h < HEADS; h++)
      for (i64 v = 0; v < VECTORS; v++) held[h][v] = load<f32x16>(q + (r + h) * DP + 16 * v);
    for (int i = 0; i < 16; i++) {
      f32x16 x[HEADS];
      for (i64 v = 0; v < VECTORS; v++) {
        f32x16 key = vector(keys[i] + 16 * v);
        IN_REGISTER(key);
        for (i64 h = 0; h < HEADS; h++) x[h] = v ? fma(held[h][v], key, x[h]) : held[h][v] * key;
      }
      for (i64 h = 0; h < HEADS; h++) dots[h][i] = x[h];
    }
    for (i64 h = 0; h < HEADS; h++) store(out + (r + h) * CHUNK, sums(dots[h]));
  }
}

struct State {  // of one new token of a row: for each chunk
  float *shares, *most, *total;  // [H, CHUNK] weights below the chunk's greatest, [HP] that, and their sum
  int32_t* votes;                // [CHUNK]
  State(const Lookup& at, i64 b, i64 slot) {
    const i64 chunks = at.state / (H * CHUNK + 2 * HP + CHUNK);
    shares = at.work + (slot * at.rows + b) * at.state;
    most = shares + chunks * H * CHUNK, total = most + chunks * HP, votes = (int32_t*)(total + chunks * HP);
  }
};
static inline i64 stored(const Lookup& at, i64 b) { return at.held[b * G] * CAP; }
// The first token that the window shows to a new token; the body's tokens are neighbours
static inline i64 reach(const Lookup& at, i64 b, i64 t) {
  const i64 held = stored(at, b);
  if (!WINDOW || !held) return 0;
  const i64 from = at.positions[b * at.tokens + t] - WINDOW + 1 - at.pages[2 * at.table[b * G * at.columns] + 1];
  return from < 0 ? 0 : from < held ? from : held;
}

// The weights that a group's heads give the tokens of a chunk, next to each other
static void scan(const Lookup& at, i64 first, i64 many, i64 b, i64 g, i64 c) {
  const i64 held = stored(at, b), from = c * CHUNK, end = from + CHUNK < held ? from + CHUNK : held;
  i64 skip[QUERIES], least = held;  // of the chunk's tokens those that the window hides
  for (i64 t = 0; t < many; t++) {
    const i64 place = reach(at, b, first + t);
    skip[t] = place > from ? place - from : 0;
    least = place < least ? place : least;
  }
  if (held - least <= MOST || least >= end || from >= held) return;
  alignas(64) float q[QUERIES][R][DP], rows[16 * DP];
  const int32_t* table = at.table + (b * G + g) * at.columns;
  const dense* keys[16];
  for (i64 t = 0; t < many; t++)
    for (i64 r = 0; r < R; r++) {
      const float* x = at.query(b, g * R + r, first + t);
      for (i64 d = 0; d < DP; d += 16) store(q[t][r] + d, read(x + d, D - d) * at.scale);
    }
  for (i64 s = from > least ? from : least / 16 * 16; s < end; s += 16) {
    for (i64 i = 0; i < 16; i++) {
      const i64 token = s + i < end ? s + i : end - 1, slot = table[token / CAP], n = token % CAP;
      keys[i] = DIRECT ? (const dense*)at.parts[0] + (slot * CAP + n) * D : (const dense*)(rows + i * DP);
      if (!DIRECT) key_row(at, g, slot, n, rows + i * DP);
    }
    if (CAP % 16 == 0 && s + AHEAD < held) {
      const i64 next = table[(s + AHEAD) / CAP], part = (s + AHEAD) % CAP / 16;
$ahead
    }
    for (i64 t = 0; t < many; t++)
      logits(q[t][0], keys, State(at, b, t).shares + (c * H + g * R) * CHUNK + s - from);
  }
  const f32x16 nothing = splat(-__builtin_inff());
  for (i64 t = 0; t < many; t++) {
    if (skip[t] >= end - from) continue;
    const State state(at, b, t);
    const i64 hidden = skip[t] % 16, begin = skip[t] - hidden;
    for (i64 h = g * R; h < (g + 1) * R; h++) {
      float* x = state.shares + (c * H + h) * CHUNK;
      if (at.softcap > 0)
        for (i64 s = begin; s < end - from; s += 16)
          store(x + s, tangent(load<f32x16>(x + s) / at.softcap) * at.softcap);
      if (hidden) store(x + begin, choose(LANE < (int32_t)hidden, nothing, load<f32x16>(x + begin)));
      if (const i64 past = (end - from) % 16) {
        float* last = x + end - from - past;
        store(last, choose(LANE < (int32_t)past, load<f32x16>(last), nothing));
      }
      f32x16 highest = nothing, added = {};
      for (i64 s = begin; s < end - from; s += 16) highest = larger(highest, load<f32x16>(x + s));
      const float peak = top(highest);
      for (i64 s = begin; s < end - from; s += 16) {
        const f32x16 v = load<f32x16>(x + s), share = choose(v == nothing, f32x16{}, decay(v - peak));
        store(x + s, share);
        added += share;
      }
      state.most[c * HP + h] = peak, state.total[c * HP + h] = sum(added);
    }
  }
}
// Of the tokens of a chunk the sum of what all heads give them
static void vote(const Lookup& at, i64 b, i64 t, i64 slot, i64 c) {
  const i64 held = stored(at, b), chunks = (held + CHUNK - 1) / CHUNK, from = reach(at, b, t), old = from / CHUNK;
  const i64 many = held - c * CHUNK < CHUNK ? held - c * CHUNK : CHUNK, skip = c == old ? from % CHUNK : 0;
  if (held - from <= MOST || c >= chunks || c < old) return;
  const State state(at, b, slot);
  alignas(64) float factor[HP];
  for (i64 h = 0; h < HP; h += 16) {
    f32x16 most = splat(-__builtin_inff()), total = {};
    for (i64 i = old; i < chunks; i++) most = larger(most, load<f32x16>(state.most + i * HP + h));
    for (i64 i = old; i < chunks; i++) {
      const f32x16 factor = exponential(load<f32x16>(state.most + i * HP + h) - most);
      total = fma(load<f32x16>(state.total + i * HP + h), factor, total);
    }
    store(factor + h, exponential(load<f32x16>(state.most + c * HP + h) - most) / total);
  }
  const float* shares = state.shares + c * H * CHUNK;
  for (i64 s = skip / 16 * 16; s < many; s += 16) {
    f32x16 sum = {};
    for (i64 h = 0; h < H; h++) sum = fma(load<f32x16>(shares + h * CHUNK + s), splat(factor[h]), sum);
    const i32x16 place = LANE + (int32_t)s, real = (place < (int32_t)many) & (place >= (int32_t)skip);
    store_scores(state.votes + c * CHUNK + s, (ordered(sum) & real) | (NEVER & ~real));
  }
}
static void choose_tokens(const Lookup& at, i64 b, i64 t, i64 slot) {
  const i64 held = stored(at, b), from = reach(at, b, t);
  int32_t* out = at.list(b, t, 0, G);
  const bool few = held - from <= MOST;
  const i64 found = few ? all(from, held, out) : best_from(State(at, b, slot).votes, from, held, MOST, out);
  for (i64 g = 0; g < G; g++) {
    at.count[(b * at.tokens + t) * G + g] = found;
    if (g) memcpy(at.list(b, t, g, G), out, found * sizeof *out);
  }
}
}  // namespace
}  // namespace ${name}_of

static void $name(Rank& rank, const int64_t* c) {
  using namespace ${name}_of;
  const Lookup& at = *(const Lookup*)c[1];
  i64 longest = 0;
  for (i64 b = 0; b < at.rows; b++) longest = stored(at, b) > longest ? stored(at, b) : longest;
  const i64 chunks = longest > MOST ? (longest + CHUNK - 1) / CHUNK : 0, block = chunks ? at.block : at.tokens;
  for (i64 first = 0; first < at.tokens; first += block) {
    const i64 many = at.tokens - first < block ? at.tokens - first : block;
    if (chunks) {
      if (first) meet(rank);  // the scratch is read no more
      share(rank, at.rows * G * chunks, [&](i64 i) {
        scan(at, first, many, i / chunks / G, i / chunks % G, i % chunks);
      });
      meet(rank);
      share(rank, at.rows * many * chunks, [&](i64 i) {
        const i64 t = i / chunks % many;
        vote(at, i / chunks / many, first + t, t, i % chunks);
      });
      meet(rank);
    }
    share(rank, chunks ? at.rows * many : at.rows, [&](i64 i) {
      if (chunks) return choose_tokens(at, i / many, first + i % many, i % many);
      for (i64 t = 0; t < at.tokens; t++) choose_tokens(at, i, t, 0);
    });
  }
}
""")
