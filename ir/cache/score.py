"""How much each stored token of a row is worth keeping: norms, positions, or the attention that queries pay to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F

from ..errors import SmeltError, nearest
from .choose import centers_order

LOGITS = 1 << 24  # most logits held at once, 64 MiB in float32; more queries go through in blocks

By = Literal["attention", "key_norm", "key_diff", "value_norm", "recency", "stride", "random", "centers"]
Reduce = Literal["mean", "max", "sum"]
Normalize = Literal["none", "count", "length"]


@dataclass(frozen=True)
class Score:
    """A score per token and KV head; higher is more worth keeping.

    `by`: `attention` sums the softmax of `queries` (and `probes`) over each key: all queries for H2O (2023), the newest
    32 with pool 5 for SnapKV (2024), the question's with `length` for Finch (2024). `key_norm` prefers short keys (A
    Simple and Effective L2 Norm-Based Strategy, 2024), `key_diff` keys that point away from the mean direction of all
    (KeyDiff, 2025), `value_norm` long values, `recency` new tokens. `stride` takes
    every `stride`-th position, and new tokens among equals (the fixed columns of Sparse Transformers, 2019). `random`
    is a hash of `seed`, head and position. `centers` takes keys far from each other, in the order of a greedy k-center
    (SubGen as its experiments run it, 2024).

    For `attention`: `queries` newest ones of the prompt (below 1: that share of them; None: all), and beside them each
    older one with probability `probes` (ZipCache, 2024: 0.05 and 0.05). `normalize`: `count` divides a sum by how many
    of its queries see the key (ZipCache's code counts all of the prompt's, which its newest probes bias);
    `length` multiplies each query's softmax by the number of keys that it sees (Finch). `reduce` joins the query heads
    of a KV head. `combine: aligned` takes the larger of the mass from the newest `local` queries and the mass from all
    of them scaled to the same mean over tokens (EMS, 2024: the paper's formula is not verified).

    `pool`: odd width of a moving average over tokens, after the reduction; its ends average the tokens that are there
    (SnapKV's own pooling counts zeros beyond them).
    """

    by: By = "attention"
    queries: float | None = None
    probes: float = 0.0
    normalize: Normalize = "none"
    pool: int = 1
    reduce: Reduce = "mean"
    combine: Literal["none", "aligned"] = "none"
    local: int = 32
    stride: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for fault in self._faults():
            raise SmeltError(f"score: {fault}")

    def _faults(self) -> Iterator[str]:
        choices = {"by": By, "normalize": Normalize, "reduce": Reduce, "combine": Literal["none", "aligned"]}
        for name, kind in choices.items():
            value, known = getattr(self, name), get_args(kind)
            if value not in known:
                yield f"unknown {name} '{value}'{nearest(str(value), known)}; known: {', '.join(known)}"
        if self.queries is not None and (self.queries < 0 or (self.queries > 1 and self.queries % 1)):
            yield f"queries is a number of tokens, a share below 1, or none for all; not {self.queries}"
        if not 0.0 <= self.probes <= 1.0:
            yield f"probes is a share of the prompt between 0 and 1, not {self.probes}"
        if self.queries == 0 and self.probes == 0:
            yield "no query is asked: set queries or probes"
        if self.pool < 1 or self.pool % 2 == 0:
            yield f"pool is an odd number of tokens, not {self.pool}"
        if self.local < 1 or self.stride < 1:
            yield f"local and stride count tokens and must be positive, not {self.local} and {self.stride}"
        plain = (self.queries, self.probes, self.normalize, self.combine) == (None, 0.0, "none", "none")
        if self.by != "attention" and not plain:
            yield f"queries, probes, normalize and combine describe attention, and the score is by {self.by}"

    def asks(self, positions: torch.Tensor, length: int) -> torch.Tensor:
        """Which queries at `positions` [n] of a prompt of `length` tokens are asked, bool [n].

        A probe is drawn by a hash of its position: chunks of a prompt and rows of a batch do not change it.
        """
        if self.queries is None:
            return torch.ones_like(positions, dtype=torch.bool)
        newest = round(self.queries * length) if 0 < self.queries < 1 else int(self.queries)
        return (positions >= length - newest) | (uniform(positions, self.seed) < self.probes)


def uniform(positions: torch.Tensor, seed: int) -> torch.Tensor:
    """A number in [0, 1) of each position (int64) and seed, float32: a hash, alike on every device and in any order."""
    x = (positions.long() + (seed % 65521) * 0x9E3779B1 + 1) & 0xFFFFFFFF
    for factor in (0x21F0AAAD, 0x735A2D97):
        x = ((x ^ (x >> 16)) * factor) & 0xFFFFFFFF  # below 2^63: the factors have 31 bits
    return ((x ^ (x >> 15)) & 0xFFFFFF).float() / (1 << 24)


def probabilities(
    q: torch.Tensor,
    k: torch.Tensor,
    seen: torch.Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale · q kᵀ) of queries q [H, n, D] over keys k [G, S, D], float32 [G, H / G, n, S].

    `seen` bool [G or 1, n, S]: a query that sees no key gives zeros. `softcap` and `sinks` [H] as in attention.
    """
    groups = k.shape[0]
    logits = q.float().unflatten(0, (groups, -1)) @ k.float()[:, None].mT * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits.masked_fill(~seen[:, None], float("-inf"))
    if sinks is not None:
        extra = sinks.float().view(groups, -1, 1, 1).expand(*logits.shape[:-1], 1)
        return torch.softmax(torch.cat([logits, extra], -1), -1)[..., :-1]
    return torch.softmax(logits, -1).masked_fill(~seen[:, None], 0.0)


def sees(q_positions: torch.Tensor, k_positions: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """Whether queries at [n] see keys at [G or 1, S]: none newer, and none `window` or more behind; [G or 1, n, S]."""
    distance = q_positions[:, None] - k_positions[:, None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def seen_by(q_positions: torch.Tensor, k_positions: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """How many of the queries at [n] see each key at [G or 1, S], int64 [G or 1, S]."""
    ordered, k_positions = q_positions.sort().values, k_positions.contiguous()
    older = torch.searchsorted(ordered, k_positions)
    newer = len(ordered) if window is None else torch.searchsorted(ordered, k_positions + window)
    return newer - older


@dataclass(frozen=True)
class Asked:
    """Whose attention is summed: queries q [H, n, D] over keys k [G, S, D], causal by positions [n] and [G or 1, S].

    `window`, `softcap` and `sinks` float32 [H] as in attention. `length` multiplies each query's softmax by the number
    of keys that it sees. Positions are int64; within a head keys and positions lie side by side, and so do queries.
    """

    q: torch.Tensor
    k: torch.Tensor
    q_positions: torch.Tensor
    k_positions: torch.Tensor
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    length: bool = False


Sums = Callable[[Asked], torch.Tensor]


def column_sums(asked: Asked) -> torch.Tensor:
    """The softmax of each query head summed over the queries, float32 [H, S]; a key that nobody sees gets zero."""
    (heads, new, _), (groups, stored, _), q = asked.q.shape, asked.k.shape, asked.q
    summed = q.new_zeros(groups, heads // groups, stored, dtype=torch.float32)
    for rows in torch.arange(new, device=q.device).split(max(1, LOGITS // (heads * stored))):
        seen = sees(asked.q_positions[rows], asked.k_positions, asked.window)
        mass = probabilities(q[:, rows], asked.k, seen, asked.scale, asked.softcap, asked.sinks)
        summed += (mass * seen.sum(-1)[:, None, :, None] if asked.length else mass).sum(2)
    return summed.flatten(0, 1)


def column_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    q_positions: torch.Tensor,
    k_positions: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    normalize: Normalize = "none",
    reduce: Reduce = "mean",
    sums: Sums = column_sums,
) -> torch.Tensor:
    """Attention that keys get from queries, summed over them: float32 [G, S]; tensors as in `Asked`, of any strides.

    The sums of the H / G query heads of a KV head are joined by `reduce`. `normalize` as in `Score`. `sums`: who adds
    up, `column_sums` or a kernel.
    """
    (heads, new, dim), (groups, stored, _) = q.shape, k.shape
    fits = heads % groups == 0 and k.shape[2] == dim and q_positions.shape == (new,)
    if not fits or k_positions.shape not in ((1, stored), (groups, stored)):
        raise ValueError(
            f"mass: needed are q [H, n, D], keys [G, S, D] where G divides H, and positions [n] and [G or 1, S], not "
            f"{list(q.shape)}, {list(k.shape)}, {list(q_positions.shape)} and {list(k_positions.shape)}"
        )
    if not stored or not new:
        return k.new_zeros(groups, stored, dtype=torch.float32)
    q_at, k_at = q_positions.long().contiguous(), k_positions.long()
    q, k, k_at = (x if x[0].is_contiguous() else x.contiguous() for x in (q, k, k_at))
    sinks = None if sinks is None else sinks.float().contiguous()
    asked = Asked(q, k, q_at, k_at, scale, window, softcap, sinks, normalize == "length")
    mass = sums(asked).view(groups, heads // groups, stored)
    if normalize == "count":
        mass = mass / seen_by(q_at, k_at, window).clamp(min=1)[:, None]
    return mass.amax(1) if reduce == "max" else mass.sum(1) if reduce == "sum" else mass.mean(1)


def scores(
    score: Score,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    q: torch.Tensor | None = None,
    q_positions: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    count: int | None = None,
    sums: Sums = column_sums,
) -> torch.Tensor:
    """Scores float32 [G, S] of a row's tokens: keys [G, S, D], values [G, S, E], positions [G or 1, S].

    For `attention` the tokens are all that the queries see, sinks and tail among them: a softmax is over all of them;
    whoever chooses among some takes their scores out. It needs the row's queries q [H, n, D], in the frame of the keys,
    at q_positions [n]: of those given, `Score.asks` takes its part, where the newest one is the prompt's last token.
    `sums` as in `column_mass`. `centers` needs `count`: how many tokens will be kept at most;
    the others get one low score.
    """
    if score.by == "attention":
        if q is None or q_positions is None:
            raise SmeltError("score: attention needs the queries of the prompt and their positions")
        newest = int(q_positions.max()) + 1 if len(q_positions) else 0
        asked = score.asks(q_positions, newest)
        q, q_positions = q[:, asked], q_positions[asked]
        at = positions.expand(keys.shape[:2])
        how = (scale, window, softcap, sinks, score.normalize, score.reduce, sums)
        found = column_mass(q, keys, q_positions, at, *how)
        if score.combine == "aligned":
            late = q_positions >= newest - score.local
            found = _aligned(found, column_mass(q[:, late], keys, q_positions[late], at, *how))
    else:
        found = _plain(score, keys, values, positions, count)
    if score.pool == 1:
        return found
    return F.avg_pool1d(found[:, None], score.pool, 1, score.pool // 2, count_include_pad=False)[:, 0]


def _aligned(total: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """The larger of local mass and all mass [G, S], the latter scaled to the mean of the former."""
    return torch.maximum(local, total * (local.mean(-1, keepdim=True) / total.mean(-1, keepdim=True).clamp(min=1e-30)))


def _plain(
    score: Score, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, count: int | None
) -> torch.Tensor:
    """Scores [G, S] that ask no queries."""
    heads, stored = keys.shape[:2]
    at = positions.expand(heads, stored)
    if score.by == "key_norm":
        return -keys.float().square().sum(-1)  # squared: the same order, without a root that makes neighbours equal
    if score.by == "key_diff":
        unit = F.normalize(keys.float(), dim=-1)
        return -(unit @ F.normalize(unit.mean(1, keepdim=True), dim=-1).mT)[..., 0]
    if score.by == "value_norm":
        return values.float().square().sum(-1)
    if score.by == "recency":
        return at.float()
    if score.by == "stride":
        return at.float() + (at % score.stride == score.stride - 1) * float(at.max() + 1 if at.numel() else 1)
    if score.by == "random":
        head = torch.arange(heads, device=keys.device)[:, None]
        return uniform(at + (head << 22), score.seed)
    if count is None:
        raise SmeltError("score: centers are found one after another: say how many tokens are kept")
    order = centers_order(keys, min(count, stored))
    rank = -torch.arange(order.shape[1], device=keys.device, dtype=torch.float32).expand_as(order)
    return keys.new_full((heads, stored), -float(stored), dtype=torch.float32).scatter(1, order, rank)
