"""The C++ text of attention mass; `mass.py` fills in the shapes and the loader of a kind of keys.

mass[h, s] = Σ_i w_i · exp(scale · q[h, i] · k[s] - ℓ[h, i]) with ℓ the log-sum-exp over the keys that query i sees, w_i
one or their number: what softmax(q kᵀ) sums to in each column, without a matrix of all queries. Queries go through in
blocks as large as the scratch holds logits for. A block takes three passes with a meeting after each: queries are
scaled, chunks of keys leave logits with a maximum and a sum, and these are turned into masses. Float32 throughout; a
key's mass is added up query by query, so that its bits do not depend on the number of threads.
"""

from __future__ import annotations

from string import Template

KERNEL = Template("""\
namespace ${name}_of {
namespace {
constexpr int64_t H = $heads, G = $groups, R = H / G, D = $dim, DP = (D + 15) / 16 * 16, CHUNK = $chunk;
typedef $dense dense;

static inline void key_row(const dense* x, float* y) {
$key_row
}

struct Mass {  // the words of a call
  const float* q;                    // [H, n, D], heads this far apart
  int64_t q_head;
  const dense* k;                    // [G, S, D]
  int64_t k_head;
  const int64_t *q_at, *k_at;        // [n] and [G or 1, S]
  int64_t k_at_head;
  const float* sinks;                // [H] or null
  float *out, *work;                 // [H, S]
  int64_t queries, keys, block, window, length;
  float scale, softcap;
  explicit Mass(const int64_t* c)
      : q((const float*)c[1]), q_head(c[2]), k((const dense*)c[3]), k_head(c[4]), q_at((const int64_t*)c[5]),
        k_at((const int64_t*)c[6]), k_at_head(c[7]), sinks((const float*)c[8]), out((float*)c[9]), work((float*)c[10]),
        queries(c[11]), keys(c[12]), block(c[13]), window(c[14]), length(c[15]), scale(real(c[16])),
        softcap(real(c[17])) {}

  int64_t chunks() const { return (keys + CHUNK - 1) / CHUNK; }
  int64_t padded() const { return (keys + 15) / 16 * 16; }
  // scratch: queries [H, block, DP], logits [H, block, padded], maxima and sums [H, block, chunks], how many keys are
  // seen [G, block, chunks]
  float* query(int64_t h, int64_t t) const { return work + (h * block + t) * DP; }
  float* logits(int64_t h, int64_t t) const { return work + H * block * DP + (h * block + t) * padded(); }
  float* parts() const { return work + H * block * (DP + padded()); }
  float* most(int64_t h, int64_t t) const { return parts() + (h * block + t) * chunks(); }
  float* total(int64_t h, int64_t t) const { return parts() + ((H + h) * block + t) * chunks(); }
  float* seen(int64_t g, int64_t t) const { return parts() + ((2 * H + g) * block + t) * chunks(); }

  bool sees(int64_t i, int64_t g, int64_t s) const {
    const int64_t distance = q_at[i] - k_at[g * k_at_head + s];
    return distance >= 0 && !(window && distance >= window);
  }
};

// Logits, maxima and sums of one chunk of keys for all queries of a block
static void score(const Mass& at, int64_t first, int64_t many, int64_t g, int64_t c) {
  const int64_t from = c * CHUNK, end = from + CHUNK < at.keys ? from + CHUNK : at.keys;
  const f32x16 nothing = splat(-__builtin_inff());
  alignas(64) float rows[16 * DP];
  for (int64_t t = 0; t < many; t++) at.seen(g, t)[c] = 0;
  for (int64_t s = from; s < end; s += 16) {
    const int count = end - s < 16 ? end - s : 16;
    int64_t oldest = INT64_MAX, newest = INT64_MIN;
    for (int j = 0; j < count; j++) {
      const int64_t place = at.k_at[g * at.k_at_head + s + j];
      oldest = place < oldest ? place : oldest, newest = place > newest ? place : newest;
    }
    for (int j = 0; j < 16; j++) key_row(at.k + g * at.k_head + (s + (j < count ? j : 0)) * D, rows + j * DP);
    for (int64_t t = 0; t < many; t++) {
      const int64_t place = at.q_at[first + t];
      i32x16 live = {};
      int seen = 0;
      const bool near = !(at.window && place - oldest >= at.window);
      if (count == 16 && near && place >= newest) live = ~live, seen = 16;
      else if (place >= oldest && !(at.window && place - newest >= at.window))
        for (int j = 0; j < count; j++)
          if (at.sees(first + t, g, s + j)) live[j] = -1, seen++;
      at.seen(g, t)[c] += seen;
      for (int64_t r = 0; r < R; r++) {
        f32x16 x = nothing;
        if (seen) {
          const float* q = at.query(g * R + r, t);
          f32x16 dots[16];
          for (int j = 0; j < 16; j++) {
            dots[j] = load<f32x16>(q) * load<f32x16>(rows + j * DP);
            for (int64_t d = 16; d < DP; d += 16) dots[j] += load<f32x16>(q + d) * load<f32x16>(rows + j * DP + d);
          }
          x = sums(dots);
          if (at.softcap > 0) x = tangent(x / at.softcap) * at.softcap;
          x = choose(live, x, nothing);
        }
        store(at.logits(g * R + r, t) + s, x);
      }
    }
  }
  for (int64_t t = 0; t < many; t++)
    for (int64_t h = g * R; h < (g + 1) * R; h++) {
      const float* x = at.logits(h, t);
      f32x16 highest = nothing, added = {};
      for (int64_t s = from; s < end; s += 16) highest = larger(highest, load<f32x16>(x + s));
      const float peak = top(highest);
      for (int64_t s = from; s < end; s += 16) {
        const f32x16 v = load<f32x16>(x + s);
        added += choose(v == nothing, f32x16{}, exponential(v - peak));
      }
      at.most(h, t)[c] = peak, at.total(h, t)[c] = sum(added);
    }
}

struct Whole {  // of a query: its greatest logit, and what e^(logit - most) is multiplied by
  float most, factor;
  Whole(const Mass& at, int64_t h, int64_t t) : most(-__builtin_inff()), factor(0) {
    const int64_t chunks = at.chunks();
    const float *mosts = at.most(h, t), *totals = at.total(h, t), *seen = at.seen(h / R, t);
    float total = 0, many = 0;
    for (int64_t c = 0; c < chunks; c++) {
      if (mosts[c] > most) most = mosts[c];
      many += seen[c];
    }
    if (at.sinks && at.sinks[h] > most) most = at.sinks[h];
    for (int64_t c = 0; c < chunks; c++)
      if (totals[c] != 0) total += totals[c] * exponential(splat(mosts[c] - most))[0];
    if (at.sinks) total += exponential(splat(at.sinks[h] - most))[0];
    if (many > 0) factor = (at.length ? many : 1.0f) / total;
  }
  f32x16 of(f32x16 logits) const {
    return choose(logits == splat(-__builtin_inff()), f32x16{}, exponential(logits - most) * factor);
  }
};

// out[h, s] of a chunk of keys += the masses of a block
static void columns(const Mass& at, int64_t first, int64_t many, int64_t h, int64_t c) {
  const int64_t from = c * CHUNK, end = from + CHUNK < at.keys ? from + CHUNK : at.keys;
  for (int64_t t = 0; t < many; t++) {
    const Whole whole(at, h, t);
    for (int64_t s = from; s < end; s += 16) {
      float* out = at.out + h * at.keys + s;
      f32x16 sum = first + t ? read(out, end - s) : f32x16{};
      write(out, sum + whole.of(load<f32x16>(at.logits(h, t) + s)), end - s);
    }
  }
}
}  // namespace
}  // namespace ${name}_of

static void $name(Rank& rank, const int64_t* words) {
  using namespace ${name}_of;
  const Mass at(words);
  const int64_t chunks = at.chunks();
  for (int64_t first = 0; first < at.queries; first += at.block) {
    const int64_t many = at.queries - first < at.block ? at.queries - first : at.block;
    if (first) meet(rank);  // the scratch is read no more
    share(rank, many * H, [&](int64_t i) {
      const int64_t h = i % H, t = i / H;
      const float* x = at.q + h * at.q_head + (first + t) * D;
      for (int64_t d = 0; d < DP; d++) at.query(h, t)[d] = d < D ? x[d] * at.scale : 0;
    });
    meet(rank);
    share(rank, G * chunks, [&](int64_t i) { score(at, first, many, i / chunks, i % chunks); });
    meet(rank);
    share(rank, H * chunks, [&](int64_t i) { columns(at, first, many, i / chunks, i % chunks); });
  }
}
""")
