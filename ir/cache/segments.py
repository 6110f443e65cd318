"""The buffers of one cache layer: appending to the tail, keeping accepted tokens, and reading what is stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..encoding import Parts
from .body import Body
from .leave import arrive
from .plan import Counts, Site
from .score import Sums, column_sums


@dataclass(frozen=True)
class Read:
    """Decoded tokens of one row: keys [G, n, D], values [G, n, E] and positions [G or 1, n].

    `bias` [G, n]: added to the logits. `seen` bool [G, T, n]: which of them each of the T new tokens reads.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    bias: torch.Tensor | None = None
    seen: torch.Tensor | None = None


class Segments:
    """Sink, bodies and tail of one site for every row of a batch; how much of them is in use is the caller's to know.

    `tail_k` [B, G, W, D] and `tail_v` [B, G, W, E] hold the tail and, behind it, the step's new tokens. `tail_q`
    [B, H, W, D]: their queries, where the site's scores need them. `tail_mass` float32 [B, G, W]: attention that they
    received so far. `sink_at` int32 [B, G]: the position of the first sink, where positions are those in the cache.
    `sink_logits` [H]: logits without values that join the softmax of each head, of models that learn them.
    """

    def __init__(
        self,
        site: Site,
        rows: int,
        width: int,
        device: torch.device,
        tables: Sequence[Mapping[str, Parts]] = (),
        capacity: int = 0,
    ) -> None:
        """Buffers for `rows` rows, with a tail of `width` slots; `tables`: calibrated parts of each body, by role.

        `capacity`: tokens of a row for whose pages the page tables have room from the start.
        """
        self.site = site
        dtype: torch.dtype = getattr(torch, site.dense)

        def dense(heads: int, tokens: int, dim: int) -> torch.Tensor:
            return torch.empty(rows, heads, tokens, dim, dtype=dtype, device=device)

        self.sink_k = dense(site.kv_heads, site.sink, site.key_dim)
        self.sink_v = dense(site.kv_heads, site.sink, site.value_dim)
        self.tail_k = dense(site.kv_heads, width, site.key_dim)
        self.tail_v = dense(site.kv_heads, width, site.value_dim)
        self.tail_q = dense(site.heads, width, site.key_dim) if site.watches else None
        self.tail_mass = torch.zeros(rows, site.kv_heads, width, device=device) if site.running else None
        self.sink_at = torch.zeros(rows, site.kv_heads, dtype=torch.int32, device=device) if site.compact else None
        self.sums: Sums = column_sums  # who has a kernel for attention by columns puts it here
        self.sink_logits: torch.Tensor | None = None  # whoever attends puts the model's own here, for scores
        self.counted = [0] * rows  # tokens whose queries `tail_mass` and the bodies' masses include
        many = len(site.caps) if site.tail is not None and site.kept else 0
        self.bodies = [
            Body(site, number, rows, device, tables[number] if tables else None, site.pages(capacity))
            for number in range(many)
        ]

    @property
    def width(self) -> int:
        """Slots of the tail buffer, W."""
        return self.tail_k.shape[2]

    @property
    def tails(self) -> dict[str, torch.Tensor]:
        """Buffers along the tail's slots, by name."""
        named = {name: getattr(self, name) for name in ("tail_k", "tail_v", "tail_q", "tail_mass")}
        return {name: tail for name, tail in named.items() if tail is not None}

    def buffers(self) -> Iterator[torch.Tensor]:
        """Every tensor that holds something of stored tokens."""
        yield from (self.sink_k, self.sink_v, *self.tails.values())
        if self.sink_at is not None:
            yield self.sink_at
        for body in self.bodies:
            yield from body.buffers()

    def used_bytes(self, row: int, counts: Counts) -> int:
        """Bytes that the stored tokens of one row take."""
        size = sum(tail[0, :, :1].numel() * tail.element_size() for tail in self.tails.values()) * counts.tail
        size += sum(sink[0, :, :1].numel() * sink.element_size() for sink in (self.sink_k, self.sink_v)) * counts.sink
        size += 4 * self.site.kv_heads * (self.sink_at is not None)
        return size + sum(body.used_bytes(row) for body in self.bodies)

    def resize_tail(self, width: int, used: list[int]) -> None:
        """Move the tail to buffers of `width` slots, keeping the first `used[b]` tokens of each row."""
        for name, old in self.tails.items():
            new = old.new_empty(*old.shape[:2], width, *old.shape[3:])
            if name == "tail_mass":
                new.zero_()
            for row, n in enumerate(used):
                new[row, :, :n] = old[row, :, :n]
            setattr(self, name, new)

    def write(self, offsets: list[int], even: bool, **new: torch.Tensor) -> None:
        """Copy new tokens k [B, G, T, D], v [B, G, T, E] or q [B, H, T, D] to `offsets[b]` of each row's tail.

        Nothing is allocated. `even`: all offsets are the same.
        """
        for name, x in new.items():
            tail, count = getattr(self, f"tail_{name}"), x.shape[2]
            if even:
                tail[:, :, offsets[0] : offsets[0] + count].copy_(x)
                continue
            for row, offset in enumerate(offsets):
                tail[row, :, offset : offset + count].copy_(x[row])

    def take_rows(self, rows: Sequence[int], index: torch.Tensor) -> None:
        """Gather rows: row i becomes the old row `index[i]`."""
        for name in ("sink_k", "sink_v", *self.tails, *(["sink_at"] if self.sink_at is not None else [])):
            setattr(self, name, getattr(self, name)[index])
        self.counted = [self.counted[row] for row in rows]
        for body in self.bodies:
            body.take_rows(rows)

    def keep(self, row: int, offset: int, accepted: list[int]) -> None:
        """Close the new tokens `accepted` of a row up behind its first `offset` tail tokens, in that order."""
        index = torch.tensor(accepted, device=self.tail_k.device) + offset
        for tail in self.tails.values():
            tail[row, :, offset : offset + len(accepted)] = tail[row].index_select(1, index)

    def clear(self, row: int) -> None:
        """Forget what a row stores."""
        self.counted[row] = 0
        for body in self.bodies:
            body.clear(row)
        if self.tail_mass is not None:
            self.tail_mass[row] = 0

    def leave(self, row: int, before: int, after: int, tail: int, prompt: bool, ids: Sequence[int] = ()) -> None:
        """Let tokens `before` … `after - 1` behind the sinks leave a row's tail, of which `tail` tokens remain.

        `prompt`: they are what a prompt leaves when it ends, to be chosen from together. `ids`: of the prompt's tokens.
        """
        site = self.site
        start = 0 if before else site.sink  # until the first page leaves, the sinks stand before it in the tail
        end = start + after - before
        arrive(self, row, slice(start, end), site.sink + before, end + tail, prompt, ids)
        if not before:
            self._sinks(row)
        for name, buffer in self.tails.items():
            buffer[row, :, :tail] = buffer[row, :, end : end + tail].clone()  # the ranges may overlap
            if name == "tail_mass":
                buffer[row, :, tail:] = 0
        if site.compact:
            self._settle(row, site.sink + after)

    def _sinks(self, row: int) -> None:
        """Move the sinks out of the tail; where their positions change, they are stored un-rotated."""
        site = self.site
        sinks = self.tail_k[row, :, : site.sink]
        if site.compact and site.rope:
            sinks = site.rope.turn(sinks.float(), -torch.arange(site.sink, device=sinks.device))
        self.sink_k[row] = sinks
        self.sink_v[row] = self.tail_v[row, :, : site.sink]

    def _settle(self, row: int, end: int) -> None:
        """Body and sinks stand right in front of the tail, which begins at position `end`."""
        assert self.sink_at is not None
        starts = torch.full((self.site.kv_heads,), end)
        for body in self.bodies:  # the newest tokens first: the tier below stands in front of what it took over
            starts = body.settle(row, starts)
        self.sink_at[row] = (starts - self.site.sink).to(self.sink_at)

    def read(self, row: int, length: int, counts: Counts, at: torch.Tensor) -> list[Read]:
        """What a row's queries may see, in float32: sink, bodies, tail, and the step's new tokens at `at` [T]."""
        out = []
        if counts.sink:
            out.append(self.sinks(row))
        out += [Read(d.keys, d.values, d.positions, d.bias) for b in self.bodies if (d := b.decoded(row)) is not None]
        return [*out, self.dense(row, length, counts.tail, at)]

    def sinks(self, row: int) -> Read:
        """The sinks as they are read."""
        places = torch.arange(self.site.sink, device=self.sink_k.device)[None]
        keys = self.sink_k[row].float()
        if self.sink_at is not None:
            places = places + self.sink_at[row, :, None]
            keys = self.site.rope.turn(keys, places) if self.site.rope else keys
        return Read(keys, self.sink_v[row].float(), places)

    def dense(self, row: int, length: int, tail: int, at: torch.Tensor) -> Read:
        """The tail and the new tokens at positions `at` [T]."""
        slots = slice(0, tail + len(at))
        places = torch.cat([torch.arange(length - tail, length, device=at.device), at])[None]
        return Read(self.tail_k[row, :, slots].float(), self.tail_v[row, :, slots].float(), places)


def keep(members: Sequence[Segments], generation: int, row: int, offset: int, accepted: list[int]) -> None:
    """`Segments.keep` of several layers; `generation`: of the cache, for who remembers where their buffers lie."""
    for segments in members:
        segments.keep(row, offset, accepted)
