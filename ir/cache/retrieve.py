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


def retrieved(
    cache: Cache,
    layer: int,
    row: int,
    q: torch.Tensor,
    reads: list[Read],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> list[Read]:
    """What a row's queries q [H, T, D] read: of the body only what the site retrieves, all of the rest.

    A list is made for every new token alone, of closed pages only: it does not depend on what else a step brings.
    What a `window` hides takes no part in the choice, and `softcap` bounds the logits that heads vote by.
    """
    segments = cache.segments[layer]
    site, (body,) = segments.site, segments.bodies
    if not int(body.host_held[row].max()):
        return reads
    at = 1 if site.sink else 0  # behind the sinks, which stand in front once anything has left the tail
    read = reads[at]
    assert site.retrieve is not None and cache.step is not None
    near = _near(read, cache.step.positions[row], window)
    if site.retrieve.by == "pages":
        seen = best_pages(site, body, row, q, near)
    elif site.retrieve.by == "reuse":
        assert site.retrieve.source is not None
        seen = cache.picked[site.retrieve.source, row]
    else:
        seen = vote(site, q, read.keys, scale, near, softcap)
    cache.picked[layer, row] = seen
    if site.retrieve.by == "dense":
        return reads
    return [*reads[:at], replace(read, seen=seen), *reads[at + 1 :]]


def _near(read: Read, at: torch.Tensor, window: int | None) -> torch.Tensor:
    """Which of the tokens that there are the window shows to queries at positions [T], bool [G, T, n]."""
    real = torch.ones_like(read.positions, dtype=torch.bool) if read.bias is None else torch.isfinite(read.bias)
    near = real[:, None].expand(-1, len(at), -1)
    return near if window is None else near & (at[:, None] - read.positions[:, None] < window)


def best_pages(site: Site, body: Body, row: int, q: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """bool [G, T, P · cap]: tokens of the pages with the highest bounds for queries q [H, T, D] (Quest, 2024).

    A page's bound is Σ_c max(q_c · low_c, q_c · high_c), at least every logit in it; of a group's heads the highest.
    Pages without a token in `near` [G, T, P · cap] are not read. A softcap does not change the order.
    """
    assert site.retrieve is not None
    most = int(body.host_held[row].max())
    slots = body.host_table[row, :, :most].long().to(body.device)
    live = torch.arange(most, device=body.device) < body.host_held[row].to(body.device)[:, None]
    slots = torch.where(live, slots, 0)
    low, high = body.side["low"][slots].float(), body.side["high"][slots].float()  # [G, P, D]
    grouped = q.float().unflatten(0, (site.kv_heads, site.group))  # [G, R, T, D]
    bound = grouped.clamp_min(0) @ high[:, None].mT + grouped.clamp_max(0) @ low[:, None].mT
    some = near.unflatten(-1, (most, body.cap)).any(-1)
    bound = bound.amax(1).masked_fill(~some, float("-inf"))  # [G, T, P]
    seen = _best(bound, site.retrieve.budget // body.cap)
    return seen.repeat_interleave(body.cap, -1)


def vote(
    site: Site, q: torch.Tensor, keys: torch.Tensor, scale: float, near: torch.Tensor, softcap: float | None = None
) -> torch.Tensor:
    """bool [G, T, n]: the tokens that all heads together attend to most, for every KV head alike (TokenSelect, 2024).

    Each query head's softmax over the body's keys [G, n, D] that are `near` [G, T, n], summed over heads. Logits that
    a model learns for its sinks are not in it, as the tokens that stand in the sinks are not.
    """
    assert site.retrieve is not None
    grouped = q.float().unflatten(0, (site.kv_heads, site.group))
    logits = grouped @ keys[:, None].mT * scale  # [G, R, T, n]
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    shares = torch.softmax(logits.masked_fill(~near[:, None], float("-inf")), -1).sum((0, 1))
    votes = shares.masked_fill(~near[0], float("-inf"))  # [T, n]
    return _best(votes, site.retrieve.budget).expand(site.kv_heads, -1, -1)


def _best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Where the `count` highest scores [..., n] are, of equal ones the older; none where they are -inf."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :count]
    real = scores.gather(-1, order) != float("-inf")
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, real)
