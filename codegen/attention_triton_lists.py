"""What each query reads of a cache body on a GPU, as lists: the best pages by their bounds, in PyTorch on the device.

The reference is `best_pages` of `ir/cache/retrieve.py`. Shapes follow from the page table alone, and nothing waits for
the device: a step that was captured in a graph makes its lists anew whenever it is replayed.
"""

from __future__ import annotations

import torch

from ..ir.cache import Cache, Site
from .attention import Picks


def refuses(site: Site) -> str | None:
    """Why no lists are made for a site on this target, or None."""
    if site.retrieve is None or site.retrieve.by == "pages":
        return None
    return f"lists of tokens (retrieve by {site.retrieve.by}) are made on target cpp alone: retrieve by pages"


def blank(cache: Cache, layer: int, tokens: int) -> Picks:
    """Buffers for the lists of a step of so many tokens; they do until the cache's `generation` changes."""
    site, (body,) = cache.plan[layer], cache.segments[layer].bodies
    assert site.retrieve is not None
    many = min(site.retrieve.budget // body.cap, body.table.shape[2])
    counts = torch.zeros(cache.batch, tokens, site.kv_heads, dtype=torch.int32, device=cache.device)
    return Picks(counts.new_zeros(*counts.shape, many), counts)


def list_pages(cache: Cache, layer: int, q: torch.Tensor, picks: Picks) -> None:
    """Set `picks` to the pages of a layer's body with the highest bounds for each of the queries q [B, H, T, D].

    Of pages that bound alike the older one is read, as in the reference.
    """
    site, (body,) = cache.plan[layer], cache.segments[layer].bodies
    if cache.prefilling or not body.slots:  # everything stands in the tail
        picks.counts.zero_()
        return
    live = torch.arange(body.table.shape[2], device=q.device) < body.held[..., None]  # [B, G, P]
    slots = torch.where(live, body.table, 0).long()
    low, high = body.side["low"][slots].float(), body.side["high"][slots].float()  # [B, G, P, D]
    grouped = q.float().unflatten(1, (site.kv_heads, site.group))  # [B, G, R, T, D]
    bound = grouped.clamp_min(0) @ high[:, :, None].mT + grouped.clamp_max(0) @ low[:, :, None].mT
    bound = bound.amax(2).masked_fill(~live[:, :, None], float("-inf"))  # [B, G, T, P]
    most = picks.entries.shape[3]
    order = torch.sort(bound, dim=-1, descending=True, stable=True).indices[..., :most]
    picks.entries.copy_(order.transpose(1, 2))
    picks.counts.copy_(body.held.clamp_max(most)[:, None].expand_as(picks.counts))
