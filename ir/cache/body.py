"""One body of a cache layer: closed pages of encoded tokens in a pool, and the pages that every row and KV head has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..encoding import Encoding, Parts
from ..errors import SmeltError
from .predict import Forecast
from .site import Site

GROWTH = 1.25  # a pool that is full grows by a quarter at least: appending stays cheap, a quarter of it lies idle

Encode = Callable[[Encoding, torch.Tensor, Parts], Parts]


def encoded(encoding: Encoding, x: torch.Tensor, tables: Parts) -> Parts:
    """Parts of pages x [S, n, dim] in plain PyTorch."""
    return encoding.encode(x, tables) if tables else encoding.encode(x)


class Tokens(NamedTuple):
    """Tokens of one KV head: keys [n, D], values [n, E], positions [n], and what else goes with each, [n] or None."""

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    bias: torch.Tensor | None = None
    mass: torch.Tensor | None = None
    owner: torch.Tensor | None = None


@dataclass(frozen=True)
class Decoded:
    """Tokens of all KV heads: keys [G, n, D], values [G, n, E], positions [G, n], bias [G, n] (-inf at padding)."""

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    bias: torch.Tensor | None
    mass: torch.Tensor | None = None
    owner: torch.Tensor | None = None


class Body:
    """Pages of one tier of a site.

    A slot of the pool is a page of one KV head of one row: parts [N, …] by name in `keys` and `values`, and
    `pages` int32 [N, 2]: how many tokens it holds (the rest repeats the last one), and the position of the first.
    `places` int32 [N, cap]: positions where tokens of a page are not neighbours. `bias` float32 [N, cap]: added to a
    token's logits. `mass` float32 [N, cap]: attention received so far. `owner` int32 [N, cap]: see `Entries`, whose
    `mass` is another. `low`, `high` float16 [N, D]: bounds of the keys
    as they are read. `table` int32 [B, G, P]: the slots of a row and KV head in the order of positions, `held` int32
    [B, G] how many. `tables`: calibrated parts of keys and values [G or 1, …].
    """

    def __init__(
        self,
        site: Site,
        number: int,
        rows: int,
        device: torch.device,
        tables: Mapping[str, Parts] | None = None,
        columns: int = 1,
    ) -> None:
        self.site, self.number, self.cap = site, number, site.caps[number]
        self.key_encoding, self.value_encoding = site.encodings[number]
        self.device = device
        self.tables: dict[str, Parts] = {role: dict((tables or {}).get(role, {})) for role in ("keys", "values")}
        self.encode: Encode = encoded  # who has a kernel for pages puts it here
        for role in ("keys", "values"):
            encoding, dim = self._of(role)
            if not self.tables[role] and not encoding.calibrated:  # tables that are always the same
                self.tables[role] = encoding.fit(torch.zeros(1, self.cap, dim))
            self.tables[role] = {name: table.to(device) for name, table in self.tables[role].items()}
        made = [self._blank(role) for role in ("keys", "values")]
        self.keys, self.values = ({n: p[:0].clone() for n, p in parts.items()} for parts in made)
        self.pages = torch.zeros(0, 2, dtype=torch.int32, device=device)
        self.side = {name: torch.empty(0, *shape, dtype=dtype, device=device) for name, (shape, dtype) in self._sides()}
        self.refs = torch.zeros(0, dtype=torch.int32)
        self.free: list[int] = []
        self.forecast: Forecast | None = None  # what the layer before says of this one's tokens
        self._told: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}  # `plain` of a row and first page
        self._newest = torch.zeros(0)  # what was foretold of the keys that `append` just stored
        self.moved = False  # whether a buffer has moved since somebody looked
        shape = rows, site.kv_heads
        self.host_table = torch.zeros(*shape, max(1, columns), dtype=torch.int32)
        self.host_held = torch.zeros(shape, dtype=torch.int32)
        self.publish(moved=True)

    def _sides(self) -> Iterator[tuple[str, tuple[tuple[int, ...], torch.dtype]]]:
        site = self.site
        if site.places:
            yield "places", ((self.cap,), torch.int32)
        if site.weighs:
            yield "bias", ((self.cap,), torch.float32)
        if site.running or site.estimate is not None:
            yield "mass", ((self.cap,), torch.float32)
        if site.estimate is not None:
            yield "owner", ((self.cap,), torch.int32)
        if site.retrieve is not None and site.retrieve.by == "pages":
            yield from ((name, ((site.key_dim,), torch.float16)) for name in ("low", "high"))

    def _blank(self, role: str) -> Parts:
        """The parts of one page of zeros, [1, …]."""
        encoding, dim = self._of(role)
        tables = {name: table[:1] for name, table in self.tables[role].items()}
        made = self.encode(encoding, torch.zeros(1, self.cap, dim, device=self.device), tables)
        for name, part in made.items():
            if part.shape[:1] != (1,):
                raise SmeltError(f"cache encoding {encoding}: pages cannot hold its part '{name}', which heads share")
        return made

    def _of(self, role: str) -> tuple[Encoding, int]:
        keys = role == "keys"
        return (self.key_encoding, self.site.key_dim) if keys else (self.value_encoding, self.site.value_dim)

    @property
    def slots(self) -> int:
        """Pages that the pool has room for, N."""
        return self.pages.shape[0]

    @property
    def places(self) -> torch.Tensor | None:
        """Positions of single tokens, where pages do not imply them."""
        return self.side.get("places")

    @property
    def bias(self) -> torch.Tensor | None:
        """What is added to the logits of tokens that stand for several."""
        return self.side.get("bias")

    def publish(self, moved: bool = False) -> None:
        """Show `table` and `held`, which changed, to kernels; `moved`: so did their shape."""
        self._told.clear()
        self.moved |= moved
        if self.device.type == "cpu":
            self.table, self.held = self.host_table, self.host_held
        elif moved:
            self.table, self.held = self.host_table.to(self.device), self.host_held.to(self.device)
        else:
            self.table.copy_(self.host_table)
            self.held.copy_(self.host_held)

    def buffers(self) -> Iterator[torch.Tensor]:
        """Every tensor that holds something of stored tokens, but the calibrated tables."""
        yield from (*self.keys.values(), *self.values.values(), *self.side.values(), self.pages, self.table, self.held)

    def page_bytes(self) -> int:
        """Bytes of one page of one KV head, with its entry in the page table."""
        of_slots = (*self.keys.values(), *self.values.values(), *self.side.values(), self.pages)
        return 4 + sum(part[0].numel() * part.element_size() for part in of_slots) if self.slots else 0

    def used_bytes(self, row: int) -> int:
        """Bytes that the pages of one row take."""
        return int(self.host_held[row].sum()) * self.page_bytes()

    def _row(self, row: int, head: int) -> torch.Tensor:
        """Slots of a row and KV head, in order."""
        return self.host_table[row, head, : int(self.host_held[row, head])].long()

    def take(self, count: int) -> torch.Tensor:
        """So many free slots; the pool grows if it must."""
        if count > len(self.free):
            old = self.slots
            size = max(old + count - len(self.free), int(old * GROWTH))
            self.free += range(old, size)
            for parts in (self.keys, self.values, self.side):
                for name, part in parts.items():
                    parts[name] = _longer(part, size)
            self.pages, self.moved = _longer(self.pages, size), True
            self.refs = torch.cat([self.refs, torch.zeros(size - old, dtype=torch.int32)])
        slots = torch.tensor(self.free[:count], dtype=torch.int64)
        del self.free[:count]
        self.refs[slots] = 1
        return slots

    def release(self, slots: torch.Tensor) -> None:
        """Give slots back that no other row refers to."""
        self.refs[slots] -= 1
        self.free += sorted(slots[self.refs[slots] == 0].tolist())

    def append(self, row: int, heads: Sequence[Tokens]) -> None:
        """Encode tokens of each KV head, in position order, as new pages behind those that it has."""
        counts = [-(-len(tokens.positions) // self.cap) for tokens in heads]
        if not sum(counts):
            return
        slots = self.take(sum(counts))
        owner = torch.repeat_interleave(torch.arange(len(heads)), torch.tensor(counts)).to(self.device)
        at = slots.to(self.device)
        filled = [self._padded(tokens) for tokens in heads if len(tokens.positions)]
        keys, values, positions = (torch.cat([f[i] for f in filled]) for i in range(3))  # [S, cap, …]
        turned = self.site.unrotates.turn(keys.float(), -positions) if self.site.unrotates else keys
        for role, x, parts in (("keys", turned, self.keys), ("values", values, self.values)):
            encoding, _ = self._of(role)
            tables = {n: t[owner] if t.shape[0] > 1 else t for n, t in self.tables[role].items()}
            rest = x.float() if self.forecast is None else x.float() - self._foretold(row, role, at, len(heads))
            for name, part in self.encode(encoding, rest, tables).items():
                parts[name].index_copy_(0, at, part)
        fill = torch.cat([f[3] for f in filled])
        self.pages.index_copy_(0, at, torch.stack([fill, positions[:, 0]], 1).to(torch.int32))
        self._sided(at, keys, positions, [f[4] for f in filled])
        self._listed(row, counts, slots)

    def _foretold(self, row: int, role: str, at: torch.Tensor, heads: int) -> torch.Tensor:
        """What the previous layer says of the pages [S, cap, dim] that go to slots `at`, the newest of every head."""
        assert self.forecast is not None
        pages = len(at) // heads
        before = self.forecast.previous.plain(row, int(self.host_held[row, 0]))
        if role == "keys":
            out = self.forecast.of_keys(before[0])
            self._newest = out
        else:  # keys of these pages are stored by now
            own = self._decoded("keys", at.view(heads, pages)).flatten(1, 2) + self._newest
            out = self.forecast.of_values(own, before[1])
        by_page: torch.Tensor = out.unflatten(1, (pages, self.cap))
        return by_page.flatten(0, 1)

    def plain(self, row: int, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [G, n, D] and values [G, n, E] of a row's pages from `first` on, in the frame in which they are stored.

        What a layer foretells its next one from is remembered until that one has asked.
        """
        if (row, first) in self._told:
            return self._told[row, first]
        slots = torch.stack([self._row(row, head)[first:] for head in range(self.site.kv_heads)]).to(self.device)
        keys, values = (self._decoded(role, slots).flatten(1, 2) for role in ("keys", "values"))
        if self.forecast is not None:
            before = self.forecast.previous.plain(row, first)
            keys = keys + self.forecast.of_keys(before[0])
            values = values + self.forecast.of_values(keys, before[1])
            self.forecast.previous._told.pop((row, first), None)
        self._told[row, first] = keys, values
        return keys, values

    def _padded(self, tokens: Tokens) -> tuple[Any, ...]:
        """Keys, values, positions [P, cap, …] of whole pages that repeat the last token, [P] fills, and side data."""
        count = len(tokens.positions)
        pages = -(-count // self.cap)
        index = torch.arange(pages * self.cap, device=tokens.positions.device).clamp_max(count - 1)
        fill = (count - torch.arange(pages, device=index.device) * self.cap).clamp_max(self.cap)
        parts = [x[index].unflatten(0, (pages, self.cap)) for x in (tokens.keys, tokens.values, tokens.positions)]
        side = {
            name: x[index].unflatten(0, (pages, self.cap))
            for name, x in (("bias", tokens.bias), ("mass", tokens.mass), ("owner", tokens.owner))
            if x is not None
        }
        return (*parts, fill, side)

    def _sided(self, at: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, given: list[Any]) -> None:
        """Write what goes with the pages at these slots beside their parts."""
        for name, buffer in self.side.items():
            if name == "places":
                value = positions.to(torch.int32)
            elif name in ("low", "high"):
                value = _bounds(keys, name)
            else:
                named = [side[name] for side in given if name in side]
                value = torch.cat(named) if named else torch.zeros(len(at), self.cap, device=self.device)
            buffer.index_copy_(0, at, value.to(buffer.dtype))

    def _listed(self, row: int, counts: Sequence[int], slots: torch.Tensor) -> None:
        """Enter new slots, head by head, into the page table."""
        need = max(int(held) + count for held, count in zip(self.host_held[row], counts, strict=True))
        width = self.host_table.shape[2]
        if need > width:
            wider = torch.zeros(*self.host_table.shape[:2], max(need, int(width * GROWTH)), dtype=torch.int32)
            wider[..., :width] = self.host_table
            self.host_table = wider
        first = 0
        for head, count in enumerate(counts):
            held = int(self.host_held[row, head])
            self.host_table[row, head, held : held + count] = slots[first : first + count].int()
            self.host_held[row, head] = held + count
            first += count
        self.publish(moved=need > width)

    def drop(self, row: int, counts: Sequence[int]) -> None:
        """Let the oldest pages of each KV head of a row go."""
        for head, count in enumerate(counts):
            slots = self._row(row, head)
            self.release(slots[:count])
            self.host_table[row, head, : len(slots) - count] = slots[count:].int()
            self.host_held[row, head] -= count
        self.publish()

    def clear(self, row: int) -> None:
        """Let every page of a row go."""
        self.drop(row, self.host_held[row].tolist())

    def take_rows(self, index: Sequence[int]) -> None:
        """Row i becomes the old row index[i]; rows share pages until one of them lets go."""
        rows = torch.tensor(list(index), dtype=torch.int64)
        self.host_table, self.host_held = self.host_table[rows], self.host_held[rows]
        live = torch.arange(self.host_table.shape[2]) < self.host_held[..., None]
        self.refs = torch.bincount(self.host_table[live].long(), minlength=self.slots).int()
        self.free = torch.nonzero(self.refs == 0).flatten().tolist()
        if self.site.compact or self.site.running:  # what these write into pages is of one row alone
            self._part()
        self.publish(moved=True)

    def _part(self) -> None:
        """Give every row pages of its own."""
        for row in range(1, self.host_table.shape[0]):
            for head in range(self.site.kv_heads):
                mine = self._row(row, head)
                if not len(mine) or bool((self.refs[mine] == 1).all()):
                    continue
                self.refs[mine] -= 1
                fresh = self.take(len(mine))
                at = fresh.to(self.device)
                for buffer in (*self.keys.values(), *self.values.values(), *self.side.values(), self.pages):
                    buffer.index_copy_(0, at, buffer[mine.to(self.device)])
                self.host_table[row, head, : len(mine)] = fresh.int()

    def gain(self, row: int, mass: torch.Tensor) -> None:
        """Add attention [G, n] to what the tokens of a row received so far."""
        for head in range(self.site.kv_heads):
            slots = self._row(row, head).to(self.device)
            real = torch.arange(self.cap, device=self.device) < self.pages[slots, :1]
            held = self.side["mass"][slots]
            held[real] += mass[head]
            self.side["mass"][slots] = held

    def settle(self, row: int, ends: torch.Tensor) -> torch.Tensor:
        """Give each KV head's tokens of a row neighbouring positions that end before ends [G]; returns their first."""
        fill = self.pages[:, 0].cpu().long()
        starts = ends.clone()
        for head in range(self.site.kv_heads):
            slots = self._row(row, head)
            sizes = fill[slots]
            starts[head] -= sizes.sum()
            first = starts[head] + sizes.cumsum(0) - sizes
            self.pages[slots.to(self.device), 1] = first.to(self.device, torch.int32)
        return starts

    def decoded(self, row: int) -> Decoded | None:
        """What a row stores as it is read, in float32; None: nothing."""
        most = int(self.host_held[row].max())
        if not most:
            return None
        slots = self.host_table[row, :, :most].long().to(self.device)  # what is not held is masked below
        live = torch.arange(most, device=self.device) < self.host_held[row].to(self.device)[:, None]
        slots = torch.where(live, slots, 0)
        inside = torch.arange(self.cap, device=self.device)
        pages = self.pages[slots].long()  # [G, P, 2]
        real = live[..., None] & (inside < pages[..., :1])
        positions = pages[..., 1:] + inside if self.places is None else self.places[slots].long()
        if self.site.predict is not None:
            keys, values = (x.unflatten(1, (most, self.cap)) for x in self.plain(row))
        else:
            keys, values = (self._decoded(role, slots) for role in ("keys", "values"))
        if self.site.unrotates:
            keys = self.site.unrotates.turn(keys, positions)
        bias = self.bias[slots] if self.bias is not None else torch.zeros(real.shape, device=self.device)
        whole = self.bias is None and bool(real.all())
        masked = None if whole else bias.masked_fill(~real, float("-inf")).flatten(1, 2)
        mass, owner = (self.side[n][slots].flatten(1, 2) if n in self.side else None for n in ("mass", "owner"))
        return Decoded(keys.flatten(1, 2), values.flatten(1, 2), positions.flatten(1, 2), masked, mass, owner)

    def _decoded(self, role: str, slots: torch.Tensor) -> torch.Tensor:
        """Keys or values [G, P, cap, dim] at slots [G, P]."""
        encoding, dim = self._of(role)
        held = {name: part[slots] for name, part in (self.keys if role == "keys" else self.values).items()}
        tables = {name: table[:, None] for name, table in self.tables[role].items()}
        return encoding.decode({**held, **tables}, (*slots.shape, self.cap, dim))


def _longer(part: torch.Tensor, size: int) -> torch.Tensor:
    grown = part.new_zeros(size, *part.shape[1:])
    grown[: len(part)] = part
    return grown


def _bounds(keys: torch.Tensor, side: str) -> torch.Tensor:
    """The least or greatest of each channel of pages [S, n, D] in float16, rounded outwards: it stays a bound."""
    exact = keys.float().amin(1) if side == "low" else keys.float().amax(1)
    stored = exact.half()
    beyond = stored.float() > exact if side == "low" else stored.float() < exact
    out = torch.full_like(stored, -torch.inf if side == "low" else torch.inf)
    return torch.where(beyond, torch.nextafter(stored.cpu(), out.cpu()).to(stored.device), stored)
