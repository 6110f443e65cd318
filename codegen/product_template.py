"""The C++ text of a matrix product; `product.py` fills in the loop over a row's groups and what comes behind it."""

from __future__ import annotations

WRITTEN = "write((float*)w[2] + (m + b) * w[3] + 16 * tile, {value}, left);"
CHOSEN = """\
const f32x16 logits = {value};
    if (w[2]) write((float*)w[2] + (m + b) * w[3] + 16 * tile, logits, left);
    if (c[8] && ((const Choice*)c[8])->on) consider((const Choice*)c[8], rank, m + b, 16 * tile, logits, left);"""

TEMPLATE = """\
// y = x W^T, W stored as {title}
namespace $name_of {{
static inline int32_t quad(const int8_t* x) {{
  int32_t word;
  memcpy(&word, x, sizeof word);
  return word;
}}
static inline float total(const float* x, int64_t count) {{
  f32x16 acc = {{}};
  for (int64_t i = 0; i < count; i += 16) acc += read(x + i, count - i);
  return sum(acc);
}}
// What is fetched while a place of a tile is read: what stands AHEAD bytes behind or, where the tile ends before that,
// in the next one that is read as this one. The last of several passes over a tile finds it in the cache, and fetches
// the same place of that next one.
template <int S, class T> struct Ahead {{
  static constexpr int64_t AHEAD = 6144, UNIT = sizeof(T) < 2 ? 4 : sizeof(T);
  int64_t size, by, jump;
  Ahead(int64_t row, bool again)
      : size(row * 16 * UNIT), by(again ? S * size : AHEAD), jump(again ? 0 : (S - 1) * size) {{}}
  inline const char* operator()(const T* part, int64_t at, int64_t tile) const {{
    const int64_t to = at * (int64_t)sizeof(T) + by;
    return (const char*)part + to + (S > 1 ? jump & -(int64_t)(to >= (tile + 1) * size) : 0);
  }}
}};
#undef DECODE
#ifdef __AVX512F__
#define DECODE(word, value, ...) (f32x16)_mm512_permutexvar_ps((__m512i)(word), (__m512)f32x16{{__VA_ARGS__}})
#else
#define DECODE(word, value, ...) value
#endif
// A decoded vector serves MANY rows of x at most. So many read WIDEST tiles at once, fewer BESIDE, and one SINGLE: sums
// that do not wait for one another
#ifdef __AVX512F__
constexpr int MANY = {many}, WIDEST = {widest}, BESIDE = {beside}, SINGLE = {single};
#else
constexpr int MANY = {many} / 2, WIDEST = 1, BESIDE = 1, SINGLE = {single} > 1 ? {single} / 2 : 1;
#endif
#undef EACH
#undef TILES
#define EACH(i, n) for (int i = 0; i < n; i++)
#define TILES for (int64_t s = 0, tile = tiles[0]; s < S; tile = tiles[++s < S ? s : 0])

// What becomes of the sums of a tile and `rows` rows of x from m on; those of a second matrix stand `apart` behind
static __attribute__((noinline)) void finish(const int64_t* c, const int64_t* w, int64_t rank, int64_t tile, int64_t m,
                                             int64_t rows, const f32x16* sums, int64_t apart) {{
  const int64_t left = w[1] - 16 * tile;
  for (int64_t b = 0; b < rows; b++) {{
    {epilogue}
    {result}
  }}
}}
// rows m to m + B - 1 of x times the sixteen rows of each of S tiles, those that exist
template <int B, int S, int W>
static void block(const int64_t* c, const int64_t* w, int64_t rank, int64_t first, int64_t end, int64_t m) {{
  const int64_t K = c[2];
  const bool again = m && m + B >= c[1];
  int64_t tiles[S];
  EACH(s, S) tiles[s] = first + s < end ? first + s : end - 1;
  {declared}
  f32x16 done[{matrices}][S][B];
{body}
  for (int64_t s = 0; s < S && first + s < end; s++)
    finish(c, w, rank, first + s, m, c[1] - m < B ? c[1] - m : B, done[0][s], S * B);
}}
template <int B>
static inline void blocks(const int64_t* c, const int64_t* w, int64_t rank, int64_t first, int64_t end, int64_t m) {{
  constexpr int LESS = B > 2 ? B / 2 : 0, S = B == MANY ? WIDEST : BESIDE;
  for (; c[1] - m > LESS; m += B)
    for (int64_t tile = first; tile < end; tile += S) block<B, S, {many}>(c, w, rank, tile, end, m);
  if constexpr (LESS > 0)
    if (m < c[1]) blocks<LESS>(c, w, rank, first, end, m);
}}
}}  // namespace $name_of

static void $name(Rank& rank, const int64_t* c) {{
  share(rank, c[7], [&](int64_t unit) {{
    const int64_t* w = c + 9;
    for (; unit >= w[0]; w += {words}) unit -= w[0];
    const int64_t tiles = (w[1] + 15) / 16, last = (unit + 1) * c[6] < tiles ? (unit + 1) * c[6] : tiles;
    using namespace $name_of;
    if (c[1] == 1)
      for (int64_t tile = unit * c[6]; tile < last; tile += SINGLE)
        block<1, SINGLE, 1>(c, w, rank.number, tile, last, 0);
    else
      for (int64_t tile = unit * c[6]; tile < last; tile += BESIDE)
        blocks<MANY>(c, w, rank.number, tile, tile + BESIDE < last ? tile + BESIDE : last, 0);
  }});
}}
"""
