"""Folds tokens that are not kept into the most similar ones that are: evict-then-merge, with a class for nothing."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from ..errors import SmeltError


class Merged(NamedTuple):
    """The kept tokens of one KV head after merging: keys [m, D], values [m, E], and ln of how many each stands for."""

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor


def to_merge(scores: torch.Tensor, kept: torch.Tensor, share: float, cover: float | None = None) -> torch.Tensor:
    """Which tokens of one KV head are merged into the tokens `kept` [m], int64, ascending; the others are evicted.

    The best of those that are not kept by `scores` [n], at most `share` of them. With `cover` only as many as the kept
    and they need to hold that share of the sum of scores: few where the attention of a head is sparse, many where it is
    spread (the sparsity by which EMS, 2024, sizes the tiers of each head; its own formula was not at hand).
    """
    rest = torch.ones_like(scores, dtype=torch.bool)
    rest[kept] = False
    others = rest.nonzero().flatten()
    best = others[scores[others].argsort(descending=True, stable=True)][: round(share * len(others))]
    if cover is not None:
        mass = scores.double().clamp(min=0)
        held = mass[kept].sum() + mass[best].cumsum(0) - mass[best]  # before each of them joins
        best = best[held < cover * mass.sum()]
    return best.sort().values


def assign(kept: torch.Tensor, merged: torch.Tensor, threshold: float = 0.0) -> torch.Tensor:
    """For keys `merged` [p, D] the row of `kept` [m, D] of the largest cosine, int64 [p]; m where none exceeds it.

    Class m is the zero class: a center at the origin, whose cosine is 0 to everything, takes what is dissimilar to all
    others (EMS, 2024). A `threshold` other than 0 moves that border.
    """
    if not len(kept):
        return torch.zeros(len(merged), dtype=torch.int64, device=merged.device)
    cosine = _unit(merged) @ _unit(kept).T
    best = cosine.amax(-1)
    at = torch.arange(len(kept), device=kept.device)
    first = torch.where(cosine == best[:, None], at, len(kept)).amin(-1)
    return torch.where(best > threshold, first, len(kept))


def merge(
    keys: torch.Tensor,
    values: torch.Tensor,
    scores: torch.Tensor,
    kept: torch.Tensor,
    merged: torch.Tensor,
    *,
    threshold: float = 0.0,
    values_only: bool = False,
    weigh: Literal["score", "count"] = "score",
    bias: torch.Tensor | None = None,
) -> Merged:
    """One KV head's keys [n, D], values [n, E] with the tokens `merged` [p] folded into the tokens `kept` [m].

    Keys are un-rotated: the mean of two rotations is none. A center and what it takes become their mean in float32,
    weighted by `scores` [n] (none negative; `count`: by how many tokens each stands for). Keys are averaged as they
    are; EMS averages their directions and keeps norms apart, by a rule that is not verified. `values_only` leaves
    centers' keys as they are (as CaM, 2024, merges). `bias` [n]: ln of how many tokens each entry stands for already;
    the new one, ln of all that a center took, belongs on its logit: without it merged tokens weigh as one.
    """
    if weigh == "score" and bool((scores < 0).any()):
        raise SmeltError("merge: negative scores are no weights: score by attention or value_norm, or weigh by count")
    count = torch.ones_like(scores, dtype=torch.float32) if bias is None else bias.float().exp()
    weight = count if weigh == "count" else scores.float()
    classes, m = assign(keys[kept], keys[merged], threshold), len(kept)
    total = weight[kept].new_zeros(m + 1).index_add(0, classes, weight[merged])[:m] + weight[kept]
    tiny = torch.finfo(torch.float32).tiny
    alone = total < tiny  # nobody has a weight: the center stays as it is

    def mean(x: torch.Tensor) -> torch.Tensor:
        own = x[kept].float()
        others = own.new_zeros(m + 1, x.shape[1]).index_add(0, classes, x[merged].float() * weight[merged, None])
        joined = (own * weight[kept, None] + others[:m]) / total.clamp(min=tiny)[:, None]
        return torch.where(alone[:, None], own, joined).to(x.dtype)

    many = count[kept] + count.new_zeros(m + 1).index_add(0, classes, count[merged])[:m]
    return Merged(keys[kept] if values_only else mean(keys), mean(values), many.log())


def _unit(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x.float(), dim=-1)
