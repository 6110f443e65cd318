"""Which body tokens a query reads: the best pages by their bounds, the best tokens by a vote, or an earlier layer's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from .site import Site

if TYPE_CHECKING:
    from .body import Body
    from .segments import Read
    from .store import Cache


def retrieved(cache: Cache, layer: int, row: int, q: torch.Tensor, reads: list[Read], scale: float) -> list[Read]:
    """What a row's queries q [H, T, D] read: of the body only what the site retrieves, all of the rest.

    A list is made for every new token alone, of closed pages only: it does not depend on what else a step brings.
    """
    segments = cache.segments[layer]
    site, (body,) = segments.site, segments.bodies
    if not int(body.host_held[row].max()):
        return reads
    at = 1 if site.sink else 0  # behind the sinks, which stand in front once anything has left the tail
    read = reads[at]
    assert site.retrieve is not None
    if site.retrieve.by == "pages":
        seen = best_pages(site, body, row, q)
    elif site.retrieve.by == "reuse":
        assert site.retrieve.source is not None
        seen = cache.picked[site.retrieve.source, row]
    else:
        seen = vote(site, q, read.keys, scale)
    cache.picked[layer, row] = seen
    if site.retrieve.by == "dense":
        return reads
    return [*reads[:at], replace(read, seen=seen), *reads[at + 1 :]]


def best_pages(site: Site, body: Body, row: int, q: torch.Tensor) -> torch.Tensor:
    """bool [G, T, P · cap]: tokens of the pages with the highest bounds for queries q [H, T, D] (Quest, 2024).

    A page's bound is Σ_c max(q_c · low_c, q_c · high_c), at least every logit in it; of a group's heads the highest.
    """
    assert site.retrieve is not None
    most = int(body.host_held[row].max())
    slots = body.host_table[row, :, :most].long().to(body.device)
    live = torch.arange(most, device=body.device) < body.host_held[row].to(body.device)[:, None]
    slots = torch.where(live, slots, 0)
    low, high = body.side["low"][slots].float(), body.side["high"][slots].float()  # [G, P, D]
    grouped = q.float().unflatten(0, (site.kv_heads, site.group))  # [G, R, T, D]
    bound = grouped.clamp_min(0) @ high[:, None].mT + grouped.clamp_max(0) @ low[:, None].mT
    bound = bound.amax(1).masked_fill(~live[:, None], float("-inf"))  # [G, T, P]
    seen = _best(bound, site.retrieve.budget // body.cap)
    return seen.repeat_interleave(body.cap, -1)


def vote(site: Site, q: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """bool [G, T, n]: the tokens that all heads together attend to most, for every KV head alike (TokenSelect, 2024).

    Each query head's softmax over the body's keys [G, n, D], summed over heads.
    """
    assert site.retrieve is not None
    grouped = q.float().unflatten(0, (site.kv_heads, site.group))
    shares = torch.softmax(grouped @ keys[:, None].mT * scale, -1).sum((0, 1))  # [T, n]
    return _best(shares, site.retrieve.budget).expand(site.kv_heads, -1, -1)


def _best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Where the `count` highest scores [..., n] are; of equal ones the older."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True)
