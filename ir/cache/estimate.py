"""SubGen's estimator: sums over all tokens that left the tail, from samples of them (Token Generation in Sublinear Time
and Memory, 2024, arXiv 2402.06082).

Attention is z / τ, with z = Σ exp(q·k) v and τ = Σ exp(q·k). Two bodies hold samples for one sum each: tokens drawn by
‖v‖² for z, and clusters of keys for τ. An entry of logit bias b and value x adds exp(q·k + b) x to z and exp(q·k + b)
to τ, so that a token which stands for w others in τ alone has b = ln w and x = 0. One that stands for w in z alone
cannot be written exactly; but with b = ln(c w) and x = v / c it adds c w exp(q·k) to τ, and these sum up to an estimate
of c τ. With weights (1 - c) w of the clusters τ is the mean of two estimates without bias, which has none either.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..errors import SmeltError
from .score import uniform


@dataclass(frozen=True)
class Estimate:
    """What a KV head holds of the tokens that left its tail.

    `values`: tokens for z. `clusters`: most clusters of keys for τ, each with its first key and `samples` others. A key
    joins the nearest cluster if it is at most `radius` times the norm of that cluster's first key away from it, or if
    there are no more clusters to be had. `mix`: c above, a power of two, so that v / c is exact; towards 0 it is the
    paper's estimate, but noise that both sums share goes away when they are divided. `seed`: of the draws.
    """

    values: int = 128
    clusters: int = 64
    samples: int = 1
    radius: float = 0.5
    mix: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        for fault in self._faults():
            raise SmeltError(f"estimate: {fault}")

    def _faults(self) -> Iterator[str]:
        for name in ("values", "clusters", "samples"):
            if getattr(self, name) < 1:
                yield f"{name} counts tokens, {getattr(self, name)} of them estimate nothing"
        if not self.radius >= 0.0:
            yield f"radius is a share of a key's norm, not {self.radius}"
        if not 0.0 < self.mix < 1.0 or math.frexp(self.mix)[0] != 0.5:
            yield f"mix is a power of two below 1, such as 0.015625, not {self.mix}"

    @property
    def most(self) -> tuple[int, int]:
        """Most entries of a KV head for z and for τ."""
        return self.values, self.clusters * (1 + self.samples)


class Entries(NamedTuple):
    """Entries of one KV head in position order: keys [n, D], values [n, E], positions [n], biases [n].

    `mass` float32 [n]: for z the threshold below which tokens were dropped, the same for all; for τ how many tokens the
    entry's cluster has. `owner` int64 [n]: the position of the first token of that cluster; for z zeros.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    bias: torch.Tensor
    mass: torch.Tensor
    owner: torch.Tensor


def drawn(how: Estimate, old: Entries, keys: torch.Tensor, values: torch.Tensor, at: torch.Tensor, key: int) -> Entries:
    """Entries for z after tokens of keys [n, D] and values [n, E] at positions [n] joined them, drawn by `key`.

    Priority sampling (Duffield, Lund and Thorup, 2007) of weights ‖v‖²: the tokens of the greatest ‖v‖² / u with u of
    its position alone are held, and one of ‖v‖² below the greatest that is not held, t, stands for t / ‖v‖². It does
    not matter in which pieces tokens come. The paper draws `values` times one token, some of them repeatedly.
    """
    stored = (values.float() / how.mix).to(values.dtype)
    keys, stored, at = torch.cat([old.keys, keys]), torch.cat([old.values, stored]), torch.cat([old.positions, at])
    weight = (stored.float() * how.mix).square().sum(-1).clamp(min=1e-20)
    priority = weight / _draw(at, key)
    order = priority.argsort(descending=True, stable=True)
    kept, others = order[: how.values].sort().values, order[how.values :]
    threshold = torch.cat([priority.new_zeros(1), old.mass, priority[others]]).amax()
    bias = math.log(how.mix) + (threshold / weight[kept]).clamp(min=1.0).log()
    mass, owner = threshold.expand(len(kept)), torch.zeros_like(at[kept])
    return Entries(keys[kept], stored[kept], at[kept], bias, mass, owner)


def clustered(
    how: Estimate, old: Entries, keys: torch.Tensor, values: torch.Tensor, at: torch.Tensor, page: int, key: int
) -> Entries:
    """Entries for τ after tokens of keys [n, D] at positions [n] joined them; all have the value 0.

    Of every cluster the first token stands for itself and `samples` others, drawn uniformly by position, for the rest.
    Tokens find their clusters in the order of positions, `page` at a time.
    """
    first = old.owner == old.positions
    many = {int(p): int(n) for p, n in zip(old.positions[first], old.mass[first], strict=True)}
    centers, owners, joined = old.keys[first], old.positions[first], []
    for some in torch.arange(len(at), device=at.device).split(page):
        owner = assigned(how, centers, owners, keys[some], at[some])
        new = owner == at[some]
        centers, owners = torch.cat([centers, keys[some][new]]), torch.cat([owners, owner[new]])
        joined.append(owner)
        for p in owner.tolist():
            many[p] = many.get(p, 0) + 1
    keys, at = torch.cat([old.keys, keys]), torch.cat([old.positions, at])
    owner = torch.cat([old.owner, *joined])
    rank = _ranks(owner, torch.where(owner == at, -1.0, _draw(at, key)))
    kept = (rank <= how.samples).nonzero()[:, 0]
    count = torch.tensor([float(many[p]) for p in owner[kept].tolist()], device=at.device)
    rest = ((count - 1) / (count - 1).clamp(max=how.samples)).log() + math.log1p(-how.mix)
    bias = torch.where(rank[kept] == 0, math.log1p(-how.mix), rest)
    return Entries(keys[kept], values.new_zeros(len(kept), values.shape[1]), at[kept], bias, count, owner[kept])


def assigned(
    how: Estimate, centers: torch.Tensor, owners: torch.Tensor, keys: torch.Tensor, at: torch.Tensor
) -> torch.Tensor:
    """For keys [n, D] at positions [n] the position of the first token of the cluster that each joins, int64 [n].

    `centers` [m, D] and `owners` [m] are those of the clusters so far. A key that finds none opens one, which keys
    behind it may join.
    """
    x, centers = keys.float(), centers.float()
    room, start = how.clusters - len(centers), 0
    near, best = x.new_full((len(x),), float("inf")), torch.full_like(at, -1)
    reach = x.new_full((len(x),), -1.0)  # of the nearest center
    if len(centers):
        # not by way of products, whose rounding depends on how many there are
        distance = torch.cdist(x, centers, compute_mode="donot_use_mm_for_euclid_dist")
        near, index = distance.min(1)
        best, reach = owners[index], how.radius * centers.norm(dim=-1)[index]
    while room and len(outside := (near[start:] > reach[start:]).nonzero()):
        new = start + int(outside[0])
        behind = torch.arange(len(x), device=at.device) >= new
        distance = (x - x[new]).square().sum(-1).sqrt()
        closer = behind & (distance < near)
        near = torch.where(closer, distance, near)
        best, reach = torch.where(closer, at[new], best), torch.where(closer, how.radius * x[new].norm(), reach)
        room, start = room - 1, new + 1
    return best


def _draw(positions: torch.Tensor, key: int) -> torch.Tensor:
    """A number in (0, 1) of each position."""
    return uniform(positions, key) + 2.0**-25


def _ranks(groups: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """How many of its group [n] are before each, in the order of `by` [n], of equal ones the first."""
    order = by.argsort(stable=True)
    order = order[groups[order].argsort(stable=True)]
    at = torch.arange(len(order), device=order.device)
    begins = torch.ones_like(at, dtype=torch.bool)
    begins[1:] = groups[order][1:] != groups[order][:-1]
    return torch.empty_like(at).scatter(0, order, at - torch.where(begins, at, 0).cummax(0).values)
