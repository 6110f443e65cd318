"""The buffers of one cache site: appending to the tail, keeping accepted tokens, and encoding pages into the body."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch

from ..encoding import Encoding, Parts
from ..errors import SmeltError
from .plan import Counts, Site


@dataclass(frozen=True)
class Read:
    """Decoded tokens of one row: keys [G, n, D], values [G, n, E] and positions [G or 1, n]."""

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor


def survivors(site: Site, keys: torch.Tensor) -> torch.Tensor:
    """Indices [G, P, kept] in position order of the tokens that survive of pages `keys` [G, P, page, D]."""
    heads, pages = keys.shape[:2]
    if not site.scattered:
        last = torch.arange(site.page - site.kept, site.page, device=keys.device)
        return last.expand(heads, pages, site.kept)
    norms = keys.float().square().sum(-1)
    lowest = torch.sort(norms, dim=-1, stable=True).indices[..., : site.kept]
    return lowest.sort(-1).values


def _buffers(
    encoding: Encoding, lead: tuple[int, int, int], page: tuple[int, int], device: torch.device
) -> dict[str, torch.Tensor]:
    """Empty part buffers [B, G, P, …] for pages [kept, D]; the parts of one encoded page give their shapes."""
    rows, heads, pages = lead
    if not pages:
        return {}
    made = encoding.encode(torch.zeros(1, *page))
    for name, part in made.items():
        if part.shape[:1] != (1,):
            raise SmeltError(f"cache encoding {encoding}: part '{name}' is shared between heads, pages cannot hold it")
    return {n: torch.empty(rows, heads, pages, *p.shape[1:], dtype=p.dtype, device=device) for n, p in made.items()}


def _encoded(encoding: Encoding, x: torch.Tensor) -> Parts:
    return encoding.encode(x)


@dataclass
class Segments:
    """Sink, body and tail of one site for every row of a batch; how much of them is in use is the caller's to know.

    `tail_k` [B, G, W, D] holds the tail and, behind it, the step's new tokens. `keys` and `values` hold the parts of
    the encoded pages, [B, G, P, …]; page p of a row lies in slot p % P. `places` [B, G, P · kept] holds the positions
    of body tokens where the layout does not imply them.
    """

    site: Site
    sink_k: torch.Tensor
    sink_v: torch.Tensor
    tail_k: torch.Tensor
    tail_v: torch.Tensor
    keys: dict[str, torch.Tensor] = field(default_factory=dict)
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    places: torch.Tensor | None = None
    encode: Callable[[Encoding, torch.Tensor], Parts] = _encoded  # who has a kernel for pages puts it here

    @classmethod
    def empty(cls, site: Site, rows: int, capacity: int, width: int, device: torch.device) -> Segments:
        """Buffers for `rows` rows of up to `capacity` tokens, with a tail of `width` slots."""
        dtype: torch.dtype = getattr(torch, site.dense)
        heads, kept, pages = site.kv_heads, site.kept, site.pages(capacity)

        def dense(tokens: int, dim: int) -> torch.Tensor:
            return torch.empty(rows, heads, tokens, dim, dtype=dtype, device=device)

        return cls(
            site,
            dense(site.sink, site.key_dim),
            dense(site.sink, site.value_dim),
            dense(width, site.key_dim),
            dense(width, site.value_dim),
            _buffers(site.key_encoding, (rows, heads, pages), (kept, site.key_dim), device),
            _buffers(site.value_encoding, (rows, heads, pages), (kept, site.value_dim), device),
            torch.empty(rows, heads, pages * kept, dtype=torch.int32, device=device) if site.places else None,
        )

    @property
    def width(self) -> int:
        """Slots of the tail buffer, W."""
        return self.tail_k.shape[2]

    @property
    def slots(self) -> int:
        """Pages that the body has room for, P."""
        return next(iter(self.keys.values())).shape[2] if self.keys else 0

    def buffers(self) -> Iterator[torch.Tensor]:
        """Every tensor that holds stored tokens."""
        yield from (self.sink_k, self.sink_v, self.tail_k, self.tail_v, *self.keys.values(), *self.values.values())
        if self.places is not None:
            yield self.places

    def used_bytes(self, counts: Counts) -> int:
        """Bytes that the stored tokens of one row take."""
        kept = self.site.kept
        pages = counts.body // kept if kept else 0
        parts = [part[0, :, :pages] for part in (*self.keys.values(), *self.values.values())]
        dense = counts.sink + counts.tail
        size = self.site.kv_heads * (self.site.key_dim + self.site.value_dim) * self.tail_k.element_size() * dense
        size += sum(part.numel() * part.element_size() for part in parts)
        return size + (4 * self.site.kv_heads * counts.body if self.places is not None else 0)

    def resize_tail(self, width: int, used: list[int]) -> None:
        """Move the tail to buffers of `width` slots, keeping the first `used[b]` tokens of each row."""
        for name in ("tail_k", "tail_v"):
            old = getattr(self, name)
            new = old.new_empty(*old.shape[:2], width, old.shape[3])
            for row, n in enumerate(used):
                new[row, :, :n] = old[row, :, :n]
            setattr(self, name, new)

    def write(self, offsets: list[int], even: bool, k: torch.Tensor, v: torch.Tensor) -> None:
        """Copy new tokens k [B, G, T, D], v [B, G, T, E] to `offsets[b]` of each row's tail; nothing is allocated.

        `even`: all offsets are the same.
        """
        new = k.shape[2]
        if even:
            first = offsets[0]
            self.tail_k[:, :, first : first + new].copy_(k)
            self.tail_v[:, :, first : first + new].copy_(v)
            return
        for row, offset in enumerate(offsets):
            self.tail_k[row, :, offset : offset + new].copy_(k[row])
            self.tail_v[row, :, offset : offset + new].copy_(v[row])

    def take_rows(self, index: torch.Tensor) -> None:
        """Gather rows: row i becomes the old row `index[i]`."""
        self.sink_k, self.sink_v = self.sink_k[index], self.sink_v[index]
        self.tail_k, self.tail_v = self.tail_k[index], self.tail_v[index]
        self.keys = {name: part[index] for name, part in self.keys.items()}
        self.values = {name: part[index] for name, part in self.values.items()}
        self.places = None if self.places is None else self.places[index]

    def keep(self, row: int, offset: int, accepted: list[int]) -> None:
        """Close the new tokens `accepted` of a row up behind its first `offset` tail tokens, in that order."""
        index = torch.tensor(accepted, device=self.tail_k.device) + offset
        for tail in (self.tail_k, self.tail_v):
            tail[row, :, offset : offset + len(accepted)] = tail[row].index_select(1, index)

    def flush(self, row: int, before: int, after: int, tail: int) -> None:
        """Let the pages `before` … `after - 1` of a row leave its tail, of which `tail` tokens remain."""
        site = self.site
        start = 0 if before else site.sink  # until the first page leaves, the sinks stand before it in the tail
        if not before:
            self.sink_k[row] = self.tail_k[row, :, : site.sink]
            self.sink_v[row] = self.tail_v[row, :, : site.sink]
        end = start + (after - before) * site.page
        first = max(before, after - self.slots)  # what the budget drops at once is not encoded
        if first < after:
            self._encode(row, first, after, end - (after - first) * site.page)
        for buffer in (self.tail_k, self.tail_v):
            buffer[row, :, :tail] = buffer[row, :, end : end + tail].clone()  # the ranges may overlap

    def _encode(self, row: int, first: int, after: int, start: int) -> None:
        """Select and encode pages `first` … `after - 1`, which begin at slot `start` of the tail."""
        site, pages = self.site, after - first
        chosen: torch.Tensor | None = None
        slots = torch.arange(first, after, device=self.tail_k.device) % self.slots
        roles = ((self.tail_k, site.key_encoding, self.keys), (self.tail_v, site.value_encoding, self.values))
        for tail, encoding, parts in roles:
            x = tail[row, :, start : start + pages * site.page].unflatten(1, (pages, site.page))
            chosen = survivors(site, x) if chosen is None else chosen
            x = x.gather(2, chosen[..., None].expand(*chosen.shape, x.shape[-1]))
            try:
                encoded = self.encode(encoding, x.float())
            except SmeltError as error:
                raise SmeltError(f"cache of layer {site.layer}, pages {first} to {after - 1}: {error}") from error
            for name, part in encoded.items():
                parts[name][row].index_copy_(1, slots, part)
        if self.places is not None and chosen is not None:
            starts = site.sink + torch.arange(first, after, device=chosen.device)[:, None] * site.page
            places = self.places[row].unflatten(1, (self.slots, site.kept))
            places.index_copy_(1, slots, (chosen + starts).to(torch.int32))

    def body_positions(self, row: int, flushed: int, tokens: int) -> torch.Tensor:
        """Positions [G or 1, n] of a row's `tokens` body tokens as they lie, after `flushed` pages left its tail."""
        if self.places is not None:
            return self.places[row, :, :tokens].long()
        site = self.site
        slots = torch.arange(tokens // site.kept, device=self.tail_k.device)
        pages = flushed - 1 - (flushed - 1 - slots) % self.slots  # the newest page that lies in each slot
        inside = torch.arange(site.page - site.kept, site.page, device=slots.device)
        return (site.sink + pages[:, None] * site.page + inside).reshape(1, -1)

    def read(self, row: int, length: int, counts: Counts, flushed: int, at: torch.Tensor) -> list[Read]:
        """What a row's queries may see, decoded to float32: sink, body, tail, and the step's new tokens at `at` [T]."""
        out = []
        if counts.sink:
            places = torch.arange(counts.sink, device=at.device)[None]
            out.append(Read(self.sink_k[row].float(), self.sink_v[row].float(), places))
        if counts.body:
            places = self.body_positions(row, flushed, counts.body)
            out.append(Read(self._decode(row, "keys", counts.body), self._decode(row, "values", counts.body), places))
        dense = slice(0, counts.tail + len(at))
        places = torch.cat([torch.arange(length - counts.tail, length, device=at.device), at])[None]
        out.append(Read(self.tail_k[row, :, dense].float(), self.tail_v[row, :, dense].float(), places))
        return out

    def _decode(self, row: int, role: Literal["keys", "values"], tokens: int) -> torch.Tensor:
        """The body's keys or values of a row, [G, n, D]."""
        site, pages = self.site, tokens // self.site.kept
        of_keys = role == "keys"
        encoding, dim = (site.key_encoding, site.key_dim) if of_keys else (site.value_encoding, site.value_dim)
        parts = {name: part[row, :, :pages] for name, part in (self.keys if of_keys else self.values).items()}
        return encoding.decode(parts, (site.kv_heads, pages, site.kept, dim)).flatten(1, 2)
