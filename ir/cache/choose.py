"""Which tokens of each KV head are kept, by their scores: evenly or shared among heads; and the order of a k-center.

Everything is deterministic: among equal scores the older token wins, among equal heads the first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import SmeltError


def choose(scores: torch.Tensor, counts: int | Sequence[int]) -> list[torch.Tensor]:
    """The best `counts[g]` tokens of each head of scores [G, n], as G sorted int64 indices; one count serves all."""
    heads, n = scores.shape
    each = [counts] * heads if isinstance(counts, int) else list(counts)
    if len(each) != heads or not all(0 <= count <= n for count in each):
        raise SmeltError(f"choose: {heads} heads of {n} tokens cannot keep {each}")
    order = _best_first(scores)
    return [order[head, :count].sort().values for head, count in enumerate(each)]


def adaptive(scores: torch.Tensor, count: int, floor: float = 0.2) -> list[int]:
    """How many tokens each head of scores [G, n] keeps when a layer keeps G · `count`: those of the highest scores.

    Every head first gets `floor` of the even part, rounded down, then the rest goes to the best tokens of all heads
    (Ada-KV, 2024, whose floor is 0.2; it blends the two budgets instead, which rounds differently). Scores of different
    heads must be comparable, as masses of attention are.
    """
    heads, n = scores.shape
    if not 0 <= count <= n or not 0.0 <= floor <= 1.0:
        raise SmeltError(f"adaptive: {count} of {n} tokens a head with a floor of {floor} cannot be kept")
    least = int(floor * count)
    order = _best_first(scores)
    ranked = scores.gather(1, order).double()
    ranked[:, :least] = float("inf")
    # rank by rank, so that equal scores go round the heads
    best = torch.sort(ranked.T.flatten(), descending=True, stable=True).indices[: heads * count]
    return [int(each) for each in torch.bincount(best % heads, minlength=heads)]


def centers_order(keys: torch.Tensor, count: int) -> torch.Tensor:
    """The greedy k-center of keys [G, n, D], in the order of choice, int64 [G, count].

    The first center is the key of the largest norm, each next one the key farthest from all before it (L2; the older
    among equals). SubGen's paper (2024) does not say where its greedy choice begins.
    """
    heads, n, _ = keys.shape
    if not 0 <= count <= n:
        raise SmeltError(f"centers: {n} tokens have no {count} centers")
    x = keys.float()
    order = torch.empty(heads, count, dtype=torch.int64, device=keys.device)
    far = x.square().sum(-1)
    nearest = torch.full_like(far, float("inf"))
    for place in range(count):
        new = _first_largest(far)
        order[:, place] = new
        distance = (x - x.gather(1, new[:, None, None].expand(heads, 1, x.shape[2]))).square().sum(-1)
        nearest = torch.minimum(nearest, distance).scatter(1, new[:, None], -1.0)  # below any distance: never again
        far = nearest
    return order


def _best_first(scores: torch.Tensor) -> torch.Tensor:
    """Indices [G, n] from the highest score on; NaN counts as lowest."""
    return torch.sort(scores.nan_to_num(nan=float("-inf")), dim=-1, descending=True, stable=True).indices


def _first_largest(x: torch.Tensor) -> torch.Tensor:
    """The first index of the largest entry of each row of x [G, n], which `argmax` leaves open."""
    at = torch.arange(x.shape[1], device=x.device)
    return torch.where(x == x.amax(-1, keepdim=True), at, x.shape[1]).amin(-1)
