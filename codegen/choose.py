"""The next token is chosen where its logits arise: argmax or Gumbel-max in the kernel of the head.

Every rank keeps the best score that it has seen of each row; when all are done, one finds the best of them. Where
nobody reads the logits they are not written. A step of one token can also *move on*: the chosen tokens become the next
step's input, positions and the counts of the cache follow, so that nothing is left to do between two steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, addressof, c_double, c_float, c_int64, c_void_p

import torch

from .rows_source import MATH
from .unit import Call, Function, packed

CHOICE = 8  # word of a head's kernel that holds its `Choice`, or 0
OUT = 11  # word that holds where logits go, or 0


class _Choice(Structure):
    """`Choice` of the source."""

    _fields_ = (
        *((name, c_int64) for name in ("on", "rows", "tokens", "seed", "moves", "tables")),
        ("temperature", c_float),
        *((name, c_void_p) for name in ("best", "requests", "positions", "chosen", "ids", "running", "counts")),
    )


class _Best(Structure):
    _fields_ = (("score", c_double), ("token", c_int64))


class Chooser:
    """Chooses behind one bound head, for as long as it is switched on.

    `chosen` int64 [B, T]: the last step's tokens, -1 where a row had no finite score.
    """

    def __init__(self, head: Call, positions: torch.Tensor, ids: torch.Tensor, ranks: int) -> None:
        """`head`: the call that computes the logits of `positions` [B, T]; `ids` [B, T]: its step's tokens."""
        batch, tokens = positions.shape
        self._head, self._logits = head, head.words[OUT]
        self.chosen = torch.zeros(batch, tokens, dtype=torch.int64)
        self._requests, self._running = torch.zeros(batch, dtype=torch.int64), torch.zeros(batch, dtype=torch.int64)
        best = (_Best * (ranks * batch * tokens))(*[_Best(float("-inf"), -1)] * (ranks * batch * tokens))
        self._choice = _Choice(rows=batch * tokens, tokens=tokens)
        buffers = {"requests": self._requests, "positions": positions, "chosen": self.chosen}
        for name, buffer in {**buffers, "ids": ids, "running": self._running}.items():
            setattr(self._choice, name, buffer.data_ptr())
        self._choice.best = addressof(best)
        head.words[CHOICE] = addressof(self._choice)
        moved = {t.untyped_storage().data_ptr() for t in (positions, ids)}
        self.call = Call(
            _CHOOSE,
            packed((ranks, addressof(self._choice))),
            head.writes,
            frozenset({*moved, "choice"}),
            small=True,
            keeps=(best, self._choice, positions, ids),
        )

    def start(self, seed: int, temperature: float, requests: torch.Tensor, logits: bool) -> None:
        """Choose from now on, greedily at temperature 0; `requests` int64 [B] key the noise; `logits`: write them."""
        self._requests.copy_(requests)
        self._choice.on, self._choice.temperature = 1, temperature
        self._choice.seed = seed - (seed >> 63 << 64)
        self._choice.moves = 0
        self._head.words[OUT] = self._logits if logits else 0

    def move(self, running: Sequence[bool], counts: Sequence[torch.Tensor]) -> None:
        """After a choice, feed it to the rows that are `running`; `counts` are the tables of `Cache.tables`."""
        self._running.copy_(torch.tensor(running))
        self._tables = (c_void_p * len(counts))(*(table.data_ptr() for table in counts))
        self._choice.moves, self._choice.tables, self._choice.counts = 1, len(counts), addressof(self._tables)

    def stop(self) -> None:
        """Only compute logits again."""
        self._choice.on = self._choice.moves = 0
        self._head.words[OUT] = self._logits


NEEDS = (
    MATH,
    """\
typedef double f64x8 __attribute__((vector_size(64)));
typedef uint64_t u64x8 __attribute__((vector_size(64)));
typedef int64_t i64x8 __attribute__((vector_size(64)));

struct Best { double score; int64_t token; };
struct Choice {
  int64_t on, rows, tokens, seed, moves, tables;
  float temperature;
  Best* best;  // [ranks, rows]
  const int64_t *requests;
  int64_t *positions, *chosen, *ids;
  const int64_t* running;
  int32_t* const* counts;
};

// log x to 1e-15, of positive normal numbers: 2 atanh((m - 1) / (m + 1)) of the mantissa, sqrt(1/2) <= m < sqrt 2
static inline f64x8 logarithm(f64x8 x) {
  const i64x8 bits = (i64x8)x, e = (bits - 0x3fe6a09e667f3bcd) >> 52;
  const f64x8 m = (f64x8)(bits - (e << 52)), s = (m - 1.0) / (m + 1.0), q = s * s;
  f64x8 p = {};
  for (int i = 11; i >= 0; i--) p = p * q + 1.0 / (2 * i + 1);
  return __builtin_convertvector(e, f64x8) * 0.693147180559945309 + 2.0 * s * p;
}
constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15;
template <class U> static inline U mixed(U x) {  // SplitMix64's finaliser
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}
static inline u64x8 random(uint64_t key, int64_t id) {  // of eight neighbouring ids
  return mixed(key + GOLDEN * ((uint64_t)id + u64x8{1, 2, 3, 4, 5, 6, 7, 8}));
}
// Standard Gumbel noise of eight neighbouring ids: `runtime/noise.py` has the formula
static inline f64x8 gumbel(uint64_t key, int64_t id) {
  const u64x8 bits = random(key, id) >> 12 | 0x4330000000000000ull;  // 2^52 + the integer, as a double
  const f64x8 u = ((f64x8)bits - 4503599627370496.0 + 0.5) * 0x1p-52;
  return -logarithm(-logarithm(u));
}
static inline bool ahead(double score, int64_t token, const Best& best) {  // NaN is ahead of all numbers
  if (score != score || best.score != best.score) return score != score;
  return score > best.score || (score == best.score && token < best.token);
}
// Whether noise may lift any of sixteen logits to the best score: by d only if 1 - u <= e^-d, since u >= e^-e^-d >=
// 1 - e^-d. Most may not, and need no logarithms. 1 - u is cut to 24 bits, and e^-d made larger than it may be rounded.
static inline bool hopeful(f32x16 logits, float best, uint64_t key, int64_t id) {
  typedef int32_t i32x8 __attribute__((vector_size(32)));
  const i32x8 halves[] = {__builtin_convertvector(~random(key, id) >> 40, i32x8),
                          __builtin_convertvector(~random(key, id + 8) >> 40, i32x8)};
  i32x16 left;
  memcpy(&left, halves, sizeof left);
  const f32x16 most = exponential(logits - best + 1e-6f * __builtin_fabsf(best)) * (1.001f * 16777216) + 1.0f;
  return sum(__builtin_convertvector(left, f32x16) > most) != -16;  // NaN is hopeful
}
// Sixteen logits of row m, of which `count` exist
static inline void consider(const Choice* g, int64_t rank, int64_t m, int64_t id, f32x16 logits, int64_t count) {
  Best& best = g->best[rank * g->rows + m];
  const int64_t n = count < 16 ? count : 16;
  if (g->temperature == 0) {
    for (int64_t i = 0; i < n; i++)
      if (!(logits[i] < best.score) && ahead(logits[i], id + i, best)) best = {logits[i], id + i};
    return;
  }
  const int64_t row = m / g->tokens;
  const uint64_t start = mixed(mixed((uint64_t)g->seed) + GOLDEN * (uint64_t)(g->requests[row] + 1));
  const uint64_t key = mixed(start + GOLDEN * (uint64_t)(g->positions[m] + 2));  // the position behind this one
  const f32x16 scaled = logits / g->temperature;
  if (!hopeful(scaled, (float)best.score, key, id)) return;
  for (int64_t half = 0; half < n; half += 8) {
    const f64x8 noise = gumbel(key, id + half);
    for (int64_t i = half; i < n && i < half + 8; i++) {
      const double score = scaled[i] + noise[i - half];
      if (ahead(score, id + i, best)) best = {score, id + i};
    }
  }
}
""",
)

_CHOOSE = Function.of(
    "choose",
    """\
// ranks, choice
static void $name(Rank&, const int64_t* c) {
  Choice* g = (Choice*)c[2];
  if (!g->on) return;
  for (int64_t m = 0; m < g->rows; m++) {
    Best found = {-__builtin_inf(), -1};
    for (int64_t rank = 0; rank < c[1]; rank++) {
      Best& best = g->best[rank * g->rows + m];
      if (best.token >= 0 && ahead(best.score, best.token, found)) found = best;
      best = {-__builtin_inf(), -1};
    }
    const bool finite = found.score - found.score == 0;
    g->chosen[m] = finite ? found.token : -1;
    if (!g->moves || !g->running[m] || !finite) continue;
    g->ids[m] = found.token;
    g->positions[m]++;
    for (int64_t i = 0; i < g->tables; i++) g->counts[i][4 * m + 2]++, g->counts[i][4 * m + 3]++;
  }
}
""",
    NEEDS,
)
