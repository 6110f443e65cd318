"""What each query reads of a cache body on a GPU: lists of the best pages by their bounds, or of tokens by a vote.

The reference is `ir/cache/retrieve.py`. Logits of tokens come from a kernel, the rest is PyTorch on the device. Shapes
follow from the page table alone, and nothing waits for the device: a step that was captured in a graph makes its lists
anew whenever it is replayed.
"""

from __future__ import annotations

import weakref

import torch

from ..ir.cache import Cache
from ..ir.errors import SmeltError
from .attention import Picks
from .retrieve_triton import logits

SCRATCH = 1 << 25  # logits of a step that are held at once, 128 MiB

_LISTS: weakref.WeakKeyDictionary[Cache, dict[tuple[int, int], Picks]] = weakref.WeakKeyDictionary()


def blank(cache: Cache, layer: int, tokens: int) -> Picks:
    """Buffers for the lists of a step of so many tokens, those of its source where a layer reuses them.

    They do until the cache's `generation` changes; layers that reuse lists ask behind the one that makes them.
    """
    site, (body,) = cache.plan[layer], cache.segments[layer].bodies
    made = _LISTS.setdefault(cache, {})
    assert site.retrieve is not None
    if site.retrieve.by == "reuse":
        source = site.retrieve.source
        if source is None or (source, tokens) not in made:
            raise SmeltError(f"layer {layer} reads the list of layer {source}, which must run before it")
        return made[source, tokens]
    unit = 1 if site.retrieve.by == "pages" else body.cap  # entries of a page
    many = min(site.retrieve.budget * unit // body.cap, body.table.shape[2] * unit)
    counts = torch.zeros(cache.batch, tokens, site.kv_heads, dtype=torch.int32, device=cache.device)
    made[layer, tokens] = Picks(counts.new_zeros(*counts.shape, many), counts)
    return made[layer, tokens]


def fill(cache: Cache, layer: int, q: torch.Tensor, picks: Picks, scale: float, softcap: float | None = None) -> None:
    """Set `picks` to what queries q [B, H, T, D] read of a layer's body; of equal entries the older are read.

    What the site's window hides is not listed. A list that is reused is left as its layer made it.
    """
    site, (body,) = cache.plan[layer], cache.segments[layer].bodies
    assert site.retrieve is not None
    if site.retrieve.by == "reuse":
        return
    if not body.slots:  # everything stands in the tail
        picks.counts.zero_()
        return
    live = torch.arange(body.table.shape[2], device=q.device) < body.held[..., None]  # [B, G, P]
    slots = torch.where(live, body.table, 0).long()
    if site.retrieve.by == "pages":
        _fill_pages(cache, layer, q, picks, live, slots)
    else:
        _fill_tokens(cache, layer, q, picks, slots[:, 0, 0], scale, softcap)


def _fill_pages(
    cache: Cache, layer: int, q: torch.Tensor, picks: Picks, live: torch.Tensor, slots: torch.Tensor
) -> None:
    """`fill` by bounds of pages at `slots` [B, G, P] that are `live`."""
    site, (body,), step = cache.plan[layer], cache.segments[layer].bodies, cache.step
    near = live[:, :, None].expand(-1, -1, q.shape[2], -1)  # [B, G, T, P]
    if site.window is not None and step is not None:
        fills, first = body.pages[slots].long().unbind(-1)
        last = first + fills - 1
        if body.places is not None:
            last = body.places[slots].gather(-1, (fills - 1).clamp_min(0)[..., None])[..., 0]
        near = near & (step.positions[:, None, :, None] - last[:, :, None] < site.window)
    low, high = body.side["low"][slots].float(), body.side["high"][slots].float()  # [B, G, P, D]
    grouped = q.float().unflatten(1, (site.kv_heads, site.group))  # [B, G, R, T, D]
    bound = grouped.clamp_min(0) @ high[:, :, None].mT + grouped.clamp_max(0) @ low[:, :, None].mT
    _best(bound.amax(2).transpose(1, 2), near.transpose(1, 2), picks)


def _fill_tokens(
    cache: Cache, layer: int, q: torch.Tensor, picks: Picks, front: torch.Tensor, scale: float, softcap: float | None
) -> None:
    """`fill` by a vote of all heads; the tokens are neighbours, from that at the begin of the slots `front` [B] on."""
    site, (body,), step = cache.plan[layer], cache.segments[layer].bodies, cache.step
    place = torch.arange(body.table.shape[2] * body.cap, device=q.device)
    near = (place < body.held[:, :1] * body.cap)[:, None].expand(-1, q.shape[2], -1)  # [B, T, n]
    if site.window is not None and step is not None:
        near = near & (step.positions[..., None] - body.pages[front, 1][:, None, None] - place < site.window)
    block = max(1, SCRATCH // (cache.batch * site.heads * len(place)))
    for first in range(0, q.shape[2], block):
        some = slice(first, first + block)
        seen = near[:, some]
        found = logits(site, body, cache.turns(layer), q[:, :, some], scale, softcap)
        shares = torch.softmax(found.masked_fill_(~seen[:, None], float("-inf")), -1).sum(1)
        _best(shares[:, :, None], seen[:, :, None], Picks(picks.entries[:, some], picks.counts[:, some]))


def _best(scores: torch.Tensor, real: torch.Tensor, picks: Picks) -> None:
    """Set `picks` to the places of the highest scores [B, T, G or 1, n] of those that are `real`."""
    most = picks.entries.shape[3]
    order = torch.sort(scores.masked_fill(~real, float("-inf")), dim=-1, descending=True, stable=True).indices
    picks.entries.copy_(order[..., :most].expand_as(picks.entries))
    picks.counts.copy_(real.sum(-1).clamp_max(most).expand_as(picks.counts))
