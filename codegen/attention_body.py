"""The C++ text of the scan over one body of a cache site: its pages as they lie, as a query's list names them, or the
tokens of such a list. `attention_source.py` fills in how pages are read.
"""

from __future__ import annotations

from string import Template

HELD = Template("""\
struct Held$body {  // a tile of body $body, decoded: keys $kind
  alignas(64) float k[$key_room], v[TILE * EP], a[$spans * 32 + 1] = {}, z[$spans * 32 + 1] = {};
  alignas(64) float spun[$spun_room];
  const float *rows[TILE], *values[TILE], *q;  // q: [QUERIES][R][DP] as keys are to be multiplied with
  Held$body() {
    for (int i = 0; i < TILE; i++) rows[i] = k + i % $tile * DP, values[i] = v + i % $tile * EP;
  }
};
""")

CODES = Template("""\
struct Codes$body {  // a tile of body $body as it is stored, decoded where it is used: for one query
$members
  int64_t j;
  int halves;
  template <int N> void dot(const float* q, int, f32x16 (*s)[2]) const {
    constexpr int W = $tile / 16;
$dealt
    f32x16 x[N][W] = {}, part[W];
$columns
    for (int r = 0; r < N; r++)
      for (int w = 0; w < W; w++) s[r][w] = x[r][w];
  }
  template <int64_t C> f32x16 at(int64_t i) const {
    const int64_t n = j * $tile + i;
$vectors
  }
};
""")

SCAN = Template("""\
  void page$body(Held$body& held, int64_t slot, int64_t next, int64_t from, int64_t to) {
    constexpr int64_t CAP = $cap, WIDE = $tile, SPANS = $spans;
    constexpr bool FOLD = $fold, SHIFT = $zero;  // the scale, and the zero, of a tile's keys go to the query
    constexpr bool STILL = $still;  // they are those of all tiles of the page
    const Pages& in = at.bodies[$body];
    const int64_t fill = in.pages[2 * slot], first = in.pages[2 * slot + 1];
    const int32_t* places = in.places ? in.places + slot * CAP : 0;
    if (WINDOW && !places && first + fill <= oldest) return;
    const bool alone = $codes && to - from == 1;
    alignas(64) float key_scale[DP], key_zero[DP], scaled[R][DP], shift[R] = {};
$pointers
$once
    const auto fold = [&](int64_t t) {
      for (int64_t r = 0; r < R; r++) {
        f32x16 constant = {};
        const float* const each = held.q + (t * R + r) * DP;
        for (int64_t d = 0; d < DP; d += 16) {
          store(scaled[r] + d, load<f32x16>(each + d) * load<f32x16>(key_scale + d));
          if (SHIFT) constant += load<f32x16>(each + d) * load<f32x16>(key_zero + d);
        }
        if (SHIFT) shift[r] = sum(constant);
      }
    };
    if (STILL && alone) fold(from);
    for (int64_t j = 0; j * WIDE < fill; j++) {
      const int count = fill - j * WIDE < WIDE ? fill - j * WIDE : WIDE;
      const int64_t start = first + j * WIDE;
      const int32_t* place = places ? places + j * WIDE : 0;
$ahead
$factors
      if (!alone) {
$decode
      }
      float* const bias = in.bias ? biases(in.bias + slot * CAP + j * WIDE, count) : 0;
$prepare
      for (int64_t t = from; t < to; t++) {
        if (!real(t)) continue;
        const uint32_t live = place ? within(t, place, count) : within(t, start, count);
        if (!live) continue;
        if (FOLD && !(STILL && alone)) fold(t);
        const float* const query = FOLD ? scaled[0] : held.q + t * R * DP;
$see
      }
    }
  }
""")

WHOLE = Template("""\
  void $whole$body(int64_t c) {
    const Pages& in = at.bodies[$body];
    Held$body held;
    $enter
    const int64_t end = (c + 1) * PER[$body] < in.held[b * G + g] ? (c + 1) * PER[$body] : in.held[b * G + g];
    const int32_t* table = in.table + (b * G + g) * in.columns;
    for (int64_t p = c * PER[$body]; p < end; p++)
      page$body(held, table[p], table[p + 1 < end ? p + 1 : p], 0, queries);
$leave  }
""")

# The page of query t's list follows no other's: a list is cut into chunks by its own places.
BY_PAGES = Template("""\
  void body$body(int64_t c) {
    const Pages& in = at.bodies[$body];
    if (!in.picks) return whole$body(c);
    Held$body held;
    $enter
    const int32_t* table = in.table + (b * G + g) * in.columns;
    for (int64_t t = 0; t < queries; t++) {
      if (!real(t)) continue;
      const int64_t list = (b * call.tokens + t0 + t) * G + g, n = in.picked[list];
      const int64_t end = (c + 1) * LISTED[$body] < n ? (c + 1) * LISTED[$body] : n;
      const int32_t* page = in.picks + list * in.longest;
      for (int64_t p = c * LISTED[$body]; p < end; p++)
        page$body(held, table[page[p]], table[page[p + 1 < end ? p + 1 : p]], t, t + 1);
    }
$leave  }
""")

BY_TOKENS = Template("""\
  // key and value of token n of a slot
  void token$body(int64_t slot, int64_t n, float* key, float* value) const {
    const Pages& in = at.bodies[$body];
$pointers
$token
  }
  void body$body(int64_t c) {
    constexpr int64_t CAP = $cap;
    const Pages& in = at.bodies[$body];
    if (!in.picks) return whole$body(c);
    Rows rows;
    alignas(64) float bias[TILE];
    int32_t places[TILE];
    const int32_t* table = in.table + (b * G + g) * in.columns;
    for (int64_t t = 0; t < queries; t++) {
      if (!real(t)) continue;
      const int64_t list = (b * call.tokens + t0 + t) * G + g, n = in.picked[list];
      const int64_t end = (c + 1) * LISTED[$body] < n ? (c + 1) * LISTED[$body] : n;
      const int32_t* token = in.picks + list * in.longest;
      for (int64_t p = c * LISTED[$body]; p < end; p += TILE) {
        const int count = end - p < TILE ? end - p : TILE;
        for (int64_t i = p + TILE; i < p + 2 * TILE && i < end; i++) {  // rows of a list lie anywhere
          const int64_t slot = table[token[i] / CAP], n = token[i] % CAP;
$rows_ahead
        }
        for (int i = 0; i < count; i++) {
          const int64_t slot = table[token[p + i] / CAP], at_slot = token[p + i] % CAP;
          float *key = rows.kb + i * DP, *value = rows.vb + i * EP;
          token$body(slot, at_slot, key, value);
          places[i] = in.places ? in.places[slot * CAP + at_slot] : in.pages[2 * slot + 1] + at_slot;
          bias[i] = in.bias ? in.bias[slot * CAP + at_slot] : 0;
          if ($turned) turn(key, at.turns + 2 * TURN * places[i]);
          rows.k[i] = key, rows.v[i] = value;
        }
        rows.pad(count);
        dense_tile(t, rows, count, within(t, places, count), in.bias ? bias : 0);
      }
    }
  }
""")
