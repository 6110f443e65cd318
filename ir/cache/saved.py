"""What one row of a cache stores, taken out bit for bit, and put back into a cache of the same plan.

A row whose prompt has not ended (`open`) is all tail and has no bodies: dense tokens side by side, which can be cut,
turned to other positions and joined. One whose prompt has ended can only be put back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import SmeltError
from .body import Body
from .options import Rope
from .plan import CachePlan
from .site import Counts, Site
from .store import Cache

TAILS = ("tail_k", "tail_v", "tail_q", "tail_mass")
TURNED = ("tail_k", "tail_q")


@dataclass(frozen=True)
class Saved:
    """A row of `length` tokens, the first `prompt` of which its prompt; tensors by `layer.name` in `parts`.

    Names are those of `Segments`: tails and sinks [G or H, n, …], `sink_at` [G], and of body b `bodies.b.held` [G],
    `bodies.b.pages`, `bodies.b.keys.part`, `bodies.b.values.part` and `bodies.b.side.name` [slots, …], head by head.
    """

    length: int
    prompt: int
    open: bool
    parts: Mapping[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())


def take_out(cache: Cache, row: int) -> Saved:
    """A copy of what a row stores, in memory of its own."""
    parts: dict[str, torch.Tensor] = {}
    for layer, segments in cache.segments.items():
        counts = _counts(cache, segments.site, row)
        for name in TAILS:
            if (tail := getattr(segments, name)) is not None:
                parts[f"{layer}.{name}"] = tail[row, :, : counts.tail]
        if counts.sink:
            parts |= {f"{layer}.{name}": getattr(segments, name)[row] for name in ("sink_k", "sink_v")}
            if segments.sink_at is not None:
                parts[f"{layer}.sink_at"] = segments.sink_at[row]
        parts[f"{layer}.counted"] = torch.tensor(segments.counted[row])
        for body in [] if cache.prefilling else segments.bodies:
            parts |= {f"{layer}.bodies.{body.number}.{name}": part for name, part in _stored(body, row)}
    copied = {name: part.detach().cpu().contiguous().clone() for name, part in parts.items()}
    return Saved(cache.lengths[row], cache.prompts[row], cache.prefilling, copied)


def _stored(body: Body, row: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The pages of a row, by name; what they are in the pool of another cache is that one's to choose."""
    held = body.host_held[row]
    slots = torch.cat([body.host_table[row, head, :count].long() for head, count in enumerate(held.tolist())])
    yield "held", held
    for name, buffer in _of_slots(body):
        yield name, buffer[slots.to(buffer.device)]


def _of_slots(body: Body) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers of a body that have a page a slot, by name."""
    yield "pages", body.pages
    for group, parts in (("keys", body.keys), ("values", body.values), ("side", body.side)):
        yield from ((f"{group}.{name}", part) for name, part in parts.items())


def put_back(cache: Cache, saved: Saved) -> None:
    """Make every row of a cache hold what was saved, and nothing else.

    Raises SmeltError, with the cache forgotten, where the parts are not those of the cache's plan.
    """
    cache.restart()
    if saved.length > cache.capacity:
        raise SmeltError(
            f"the prefix has {saved.length} tokens, but the cache was made for a context of {cache.capacity}: "
            "raise the context limit, or read less"
        )
    try:
        _announce(cache, saved)
        known = {name for row in range(cache.batch) for name in _put_row(cache, row, saved)}
        if strange := sorted(set(saved.parts) - known):
            raise SmeltError(f"the prefix has the part '{strange[0]}', which this cache plan does not store")
    except BaseException:
        cache.restart()
        raise


def _counts(cache: Cache, site: Site, row: int) -> Counts:
    """Stored tokens by segment of a row."""
    length = cache.lengths[row]
    return Counts(0, 0, length) if cache.prefilling else site.counts(length, cache.prompts[row])


def _announce(cache: Cache, saved: Saved) -> None:
    """Set lengths and counts of every row, with room in the tails."""
    cache.lengths, cache.prompts = [saved.length] * cache.batch, [saved.prompt] * cache.batch
    cache.prefilling = saved.open
    for schedule in cache._schedules.values():
        for row in range(cache.batch):
            counts = _counts(cache, schedule.site, row)
            schedule.set(row, counts, saved.length)
            for segments in schedule.members:
                if segments.width < counts.tail + cache.scratch:
                    segments.resize_tail(counts.tail + cache.scratch, [0] * cache.batch)
        schedule.aim()


def _put_row(cache: Cache, row: int, saved: Saved) -> Iterator[str]:
    """Write one row; yields the names of the parts that were written."""

    def part(name: str, like: torch.Tensor) -> torch.Tensor:
        found = saved.parts.get(name)
        if found is None or found.shape != like.shape or found.dtype != like.dtype:
            what = "is missing" if found is None else f"is {found.dtype} {list(found.shape)}"
            raise SmeltError(f"the prefix's part '{name}' {what}, the cache plan has {like.dtype} {list(like.shape)}")
        return found.to(like.device)

    for layer, segments in cache.segments.items():
        counts = _counts(cache, segments.site, row)
        buffers = {name: getattr(segments, name) for name in TAILS}
        used = {name: buffer[row, :, : counts.tail] for name, buffer in buffers.items() if buffer is not None}
        if counts.sink:
            used |= {"sink_k": segments.sink_k[row], "sink_v": segments.sink_v[row]}
            used |= {} if segments.sink_at is None else {"sink_at": segments.sink_at[row]}
        for name, place in used.items():
            place.copy_(part(f"{layer}.{name}", place))
            yield f"{layer}.{name}"
        segments.counted[row] = int(part(f"{layer}.counted", torch.tensor(0)))
        yield f"{layer}.counted"
        for body in [] if saved.open else segments.bodies:
            lead = f"{layer}.bodies.{body.number}"
            held = part(f"{lead}.held", body.host_held[row])
            if int(held.min()) < 0 or int(held.sum()) > saved.length * held.numel():  # a page holds a token at least
                raise SmeltError(f"the prefix's part '{lead}.held' counts {int(held.sum())} pages")
            slots = body.take(int(held.sum()))
            for name, buffer in _of_slots(body):
                at = slots.to(buffer.device)
                buffer.index_copy_(0, at, part(f"{lead}.{name}", buffer[:1].expand(len(at), *buffer.shape[1:])))
                yield f"{lead}.{name}"
            body._listed(row, held.tolist(), slots)
            yield f"{lead}.held"
    cache.generation += 1


def cut(saved: Saved, start: int, end: int) -> Saved:
    """Tokens `start` … `end - 1` of an open row, at the positions where they stood."""
    _check_open(saved)
    parts = {
        name: part[:, start:end] if name.split(".")[1] in TAILS else torch.tensor(0)
        for name, part in saved.parts.items()
    }
    return replace(saved, length=end - start, prompt=0, parts=parts)


def turned(saved: Saved, plan: CachePlan, shift: int) -> Saved:
    """The tokens of an open row as if they stood `shift` positions further on: rot(k, p) becomes rot(k, p + shift)."""
    _check_open(saved)
    if not shift:
        return saved
    parts = dict(saved.parts)
    for name, part in saved.parts.items():
        layer, kind = name.split(".", 1)
        if kind in TURNED:
            rope = _rope(plan[int(layer)])
            parts[name] = rope.turn(part.float(), torch.full((part.shape[1],), shift)).to(part.dtype)
    return replace(saved, parts=parts)


def join(pieces: Sequence[Saved]) -> Saved:
    """Tokens of open rows side by side; each must have been turned to where it comes to stand."""
    for piece in pieces:
        _check_open(piece)
    names = pieces[0].parts
    parts = {
        name: torch.cat([piece.parts[name] for piece in pieces], 1) if part.dim() > 1 else torch.tensor(0)
        for name, part in names.items()
    }
    return Saved(sum(piece.length for piece in pieces), 0, True, parts)


def _check_open(saved: Saved) -> None:
    if not saved.open:
        raise SmeltError("the cache of a prompt that has ended cannot be cut or joined: its tokens are encoded")


def _rope(site: Site) -> Rope:
    if site.rope is None:
        raise SmeltError(
            f"keys of layer {site.layer} are not known to be rotated by their positions, so they cannot be moved"
        )
    return site.rope
