"""What becomes of tokens that leave the tail: scored, chosen, merged, and written to the bodies in position order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..errors import SmeltError
from .body import Body, Tokens
from .choose import adaptive, choose
from .estimate import Entries, clustered, drawn
from .merge import merge, to_merge
from .policy import profile
from .score import column_mass, scores
from .site import Site

if TYPE_CHECKING:
    from .segments import Segments

Chosen = Sequence[torch.Tensor]  # for each KV head the survivors' indices, ascending


def arrive(
    segments: Segments, row: int, slots: slice, first: int, used: int, prompt: bool, ids: Sequence[int] = ()
) -> None:
    """Store in the bodies what survives of the tail's `slots`, whose tokens stand at positions `first` and later.

    `used`: tokens that the tail holds now. `prompt`: choose from all of them together. `ids`: of a prompt's tokens.
    """
    site = segments.site
    if site.running:
        _weigh(segments, row, used, first - slots.start)
    if not segments.bodies:
        return
    positions = torch.arange(first, first + slots.stop - slots.start, device=segments.tail_k.device)
    try:
        if prompt and first > slots.start:
            _chunk(segments, row, slots, positions, used)
        elif prompt:
            _prompt(segments, row, slots, positions, used, ids)
        elif site.select is not None and site.select.when == "overflow":
            _overflow(segments, row, slots, positions)
        elif site.estimate is not None:
            _estimated(segments, row, slots, positions)
        else:
            _pages(segments, row, slots, first, used)
    except SmeltError as error:
        last = first + slots.stop - slots.start - 1
        raise SmeltError(f"cache of layer {site.layer}, tokens {first} to {last}: {error}") from error


def _pages(segments: Segments, row: int, slots: slice, first: int, used: int) -> None:
    """Of every page that leaves, survivors become one page of each body; then bodies let go what exceeds them."""
    site, bodies = segments.site, segments.bodies
    most = _most(site, 0)
    pages = (slots.stop - slots.start) // site.page
    skip = 0 if most is None or site.tiers else max(0, pages - most)  # what the budget drops at once is not encoded
    span = slice(slots.start + skip * site.page, slots.stop)
    keys, values = segments.tail_k[row, :, span], segments.tail_v[row, :, span]
    paged = keys.unflatten(1, (pages - skip, site.page))
    given = _score_of_tail(segments, row, span, used) if site.kept < site.page else None
    left = first + skip * site.page
    positions = torch.arange(left, first + pages * site.page, device=keys.device)
    for body, chosen in zip(bodies, survivors(site, paged, values, left, given), strict=False):
        offsets = torch.arange(pages - skip, device=keys.device)[:, None] * site.page
        index = (chosen + offsets).flatten(1)  # [G, P · cap]
        body.append(row, _picked(keys, values, positions, list(index)))
    for number, body in enumerate(bodies):
        limit = _most(site, number)
        if limit is None:
            continue
        over = [max(0, int(held) - limit) for held in body.host_held[row]]
        if any(over) and number + 1 < len(bodies) and site.hold:
            bodies[number + 1].append(row, _oldest(body, row, over))
        body.drop(row, over)


def _most(site: Site, number: int) -> int | None:
    """Most pages of a body, or None."""
    if site.hold is not None:
        budget = site.hold if number == 0 else site.tiers[number - 1].budget
    else:
        budget = site.select.budget if site.select and site.select.when == "page" else None
    return None if budget is None else budget // site.caps[number]


def survivors(
    site: Site, paged: torch.Tensor, values: torch.Tensor, first: int = 0, given: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """For each body the indices [G, P, cap] of a page's tokens that it gets, ascending.

    `paged` [G, P, page, D] and `values` [G, P · page, E] begin at position `first`; `given` [G, P · page]: scores.
    Every page is judged by itself, so that it does not matter how many leave at once.
    """
    heads, pages = paged.shape[:2]
    if not site.scattered or site.kept == site.page:
        last = torch.arange(site.page - site.survivors, site.page, device=paged.device)
        return [last.expand(heads, pages, -1)]
    assert site.select is not None
    if given is None:
        of_pages = []
        for page in range(pages):
            at = torch.arange(page * site.page, (page + 1) * site.page, device=paged.device)
            of_pages.append(scores(site.select.score, paged[:, page], values[:, at], at + first))
        found = torch.stack(of_pages, 1)
    else:
        found = given.unflatten(1, (pages, site.page))
    order = torch.sort(found, dim=-1, descending=True, stable=True).indices
    out, start = [], 0
    for cap in site.caps:
        out.append(order[..., start : start + cap].sort(-1).values)
        start += cap
    return out


def _score_of_tail(segments: Segments, row: int, span: slice, used: int) -> torch.Tensor | None:
    """Scores [G, n] of a part of the tail by the attention of the tail's queries; None: the score needs no queries."""
    site = segments.site
    if not site.watches or segments.tail_q is None or site.select is None:
        return None
    places = torch.arange(used, device=segments.tail_k.device)
    keys, values = segments.tail_k[row, :, :used], segments.tail_v[row, :, :used]
    return _score(segments, row, keys, values, places, places)[:, span]


def _score(
    segments: Segments, row: int, keys: torch.Tensor, values: torch.Tensor, places: torch.Tensor, at: torch.Tensor
) -> torch.Tensor:
    """Scores [G, S] of keys and values at `places` [G, S] or [S] by the queries of the tail's tokens, at `at` [n]."""
    site = segments.site
    assert site.select is not None and segments.tail_q is not None
    return scores(
        site.select.score,
        keys,
        values,
        positions=places,
        q=segments.tail_q[row, :, : len(at)],
        q_positions=at,
        scale=site.attention_scale,
        window=site.window,
        softcap=site.softcap,
        sinks=segments.sink_logits,
        sums=segments.sums,
    )


def _prompt(segments: Segments, row: int, slots: slice, positions: torch.Tensor, used: int, ids: Sequence[int]) -> None:
    """Choose among all of a prompt but sinks and tail, and share the survivors out to the bodies."""
    site, select = segments.site, segments.site.select
    assert select is not None
    keys, values = segments.tail_k[row, :, slots], segments.tail_v[row, :, slots]
    count = site.survive(len(positions))
    mass = None if segments.tail_mass is None else segments.tail_mass[row, :, slots]
    if mass is not None:
        found = _worth(segments, row, mass, positions)
    else:
        given = _score_of_tail(segments, row, slots, used) if select.score.by == "attention" else None
        found = scores(select.score, keys, values, positions, count=count) if given is None else given
    if select.policy is not None:
        chosen: Chosen = _profiled(segments, row, slots, used, ids)
    else:
        chosen = choose(found, adaptive(found, count, select.floor) if select.heads == "adaptive" else count)
    bias = None
    if site.merge is not None:
        keys, values, bias = _merged(site, keys, values, positions, found, chosen)
    for body, of_body in zip(segments.bodies, _parted(site, found, chosen), strict=True):
        heads = _picked(keys, values, positions, of_body)
        if mass is not None:
            heads = [t._replace(mass=mass[g, index]) for g, (t, index) in enumerate(zip(heads, of_body, strict=True))]
        if bias is not None:
            heads = [t._replace(bias=bias[g, index]) for g, (t, index) in enumerate(zip(heads, of_body, strict=True))]
        body.append(row, heads)


def _profiled(segments: Segments, row: int, slots: slice, used: int, ids: Sequence[int]) -> Chosen:
    """The candidates among the tail's `slots` that the policy of each KV head keeps."""
    site, select = segments.site, segments.site.select
    assert select is not None and select.policy is not None and segments.tail_q is not None
    at = torch.arange(used, device=segments.tail_k.device)
    policy = select.policy
    known = torch.tensor(ids if len(ids) == used else [-1] * used, device=at.device)
    special = (at < site.sink) | torch.isin(known, torch.tensor(policy.special, dtype=torch.int64, device=at.device))
    punctuation = torch.isin(known, torch.tensor(policy.punctuation, dtype=torch.int64, device=at.device))
    found = profile(
        select.policy, segments.tail_q[row, :, :used], segments.tail_k[row, :, :used], at, at, special, punctuation,
        site.attention_scale, always=site.tail or 0, window=site.window, softcap=site.softcap,
        sinks=segments.sink_logits, sums=segments.sums,
    )  # fmt: skip
    return [h.kept[(h.kept >= slots.start) & (h.kept < slots.stop)] - slots.start for h in found]


def _parted(site: Site, found: torch.Tensor, chosen: Chosen) -> list[Chosen]:
    """Each head's survivors for each body, the best for the first, in position order."""
    if len(site.caps) == 1:
        return [chosen]
    ranked = [index[found[head, index].argsort(descending=True, stable=True)] for head, index in enumerate(chosen)]
    shared = [order.split(site.parted(len(order))) for order in ranked]
    return [[part.sort().values for part in of_body] for of_body in zip(*shared, strict=True)]


def _merged(
    site: Site, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, found: torch.Tensor, chosen: Chosen
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values with what the best of the others added to the survivors, and the survivors' biases [G, n]."""
    assert site.merge is not None
    turns = site.rope is not None and not site.merge.values_only
    plain = site.rope.turn(keys.float(), -positions) if turns and site.rope else keys.float()
    new_keys, new_values, bias = plain.clone(), values.float().clone(), torch.zeros_like(found)
    for head, kept in enumerate(chosen):
        others = to_merge(found[head], kept, site.merge.share, site.merge.cover)
        made = merge(
            plain[head], values[head].float(), found[head], kept, others,
            threshold=site.merge.threshold, values_only=site.merge.values_only,
        )  # fmt: skip
        new_keys[head, kept], new_values[head, kept], bias[head, kept] = made.keys, made.values, made.bias
    back = site.rope.turn(new_keys, positions) if turns and site.rope else new_keys
    return back, new_values, bias


def _chunk(segments: Segments, row: int, slots: slice, positions: torch.Tensor, used: int) -> None:
    """One more chunk of a prompt joins the body; the question behind it chooses among both, and the best stay."""
    site, (body,) = segments.site, segments.bodies
    assert site.select is not None
    keys, values, start = segments.tail_k[row, :, slots], segments.tail_v[row, :, slots], int(positions[0])
    fresh = _picked(keys, values, positions, [torch.arange(len(positions), device=keys.device)] * site.kv_heads)
    both = [_joined(old, new) for old, new in zip(_stored(body, row), fresh, strict=True)]
    seen, places = (torch.cat(parts, 1) for parts in zip(*_whole(segments, row, used, start), strict=True))
    found = _score(segments, row, seen, seen, places, torch.arange(start, start + used, device=keys.device))
    chosen = choose(
        found[:, site.sink :][:, : len(both[0].positions)], site.survive(start + len(positions) - site.sink)
    )
    body.clear(row)
    body.append(row, [_taken(tokens, index) for tokens, index in zip(both, chosen, strict=True)])


def _estimated(segments: Segments, row: int, slots: slice, positions: torch.Tensor) -> None:
    """What leaves joins the samples for both sums, and bodies hold those that are drawn."""
    site = segments.site
    assert site.estimate is not None
    keys, values = segments.tail_k[row, :, slots], segments.tail_v[row, :, slots]
    for body in segments.bodies:
        made = []
        for head, old in enumerate(_entries(body, row)):
            key = 2 * (128 * (1024 * site.estimate.seed + site.layer) + head) + body.number
            new = keys[head], values[head], positions
            if body.number == 0:
                held = drawn(site.estimate, old, *new, key)
            else:
                held = clustered(site.estimate, old, *new, site.page, key)
            made.append(Tokens(*held))
        body.clear(row)
        body.append(row, made)


def _entries(body: Body, row: int) -> list[Entries]:
    """What a body of samples holds of a row, head by head."""
    d, site = body.decoded(row), body.site
    if d is None:
        none = torch.zeros(0, device=body.device)
        blank = none.view(0, site.key_dim), none.view(0, site.value_dim)
        return [Entries(*blank, none.long(), none, none, none.long())] * site.kv_heads
    assert d.bias is not None and d.mass is not None and d.owner is not None
    real = torch.isfinite(d.bias)
    sides = d.keys, d.values, d.positions, d.bias, d.mass, d.owner.long()
    return [Entries(*(x[head, real[head]] for x in sides)) for head in range(site.kv_heads)]


def _overflow(segments: Segments, row: int, slots: slice, positions: torch.Tensor) -> None:
    """Pages join the body one by one; whenever it exceeds its budget the best of it stay."""
    site, (body,) = segments.site, segments.bodies
    assert site.select is not None
    for start in range(slots.start, slots.stop, site.page):
        span, at = slice(start, start + site.page), positions[start - slots.start :][: site.page]
        keys, values = segments.tail_k[row, :, span], segments.tail_v[row, :, span]
        fresh = _picked(keys, values, at, [torch.arange(site.page, device=keys.device)] * site.kv_heads)
        if segments.tail_mass is not None:
            fresh = [tokens._replace(mass=segments.tail_mass[row, g, span]) for g, tokens in enumerate(fresh)]
        held = _stored(body, row)
        if len(held[0].positions) + site.page <= (site.select.budget or 0):
            body.append(row, fresh)
            continue
        both = [_joined(old, new) for old, new in zip(held, fresh, strict=True)]
        body.clear(row)
        body.append(row, [_best(segments, row, tokens) for tokens in both])


def _best(segments: Segments, row: int, tokens: Tokens) -> Tokens:
    """The tokens of a KV head that survive an overflow."""
    site = segments.site
    assert site.select is not None
    if tokens.mass is not None:
        found = _worth(segments, row, tokens.mass[None], tokens.positions)
    else:
        found = scores(site.select.score, tokens.keys[None], tokens.values[None], tokens.positions)
    (kept,) = choose(found, site.shrunk)
    return _taken(tokens, kept)


def _worth(segments: Segments, row: int, mass: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Attention that tokens received so far, or its mean over the queries that could see them; positions [n]."""
    site = segments.site
    assert site.select is not None
    if site.select.score.normalize != "count":
        return mass
    asked = segments.counted[row] - positions
    return mass / (asked if site.window is None else asked.clamp_max(site.window))


def _weigh(segments: Segments, row: int, used: int, start: int) -> None:
    """Add the attention of queries that were not counted yet to what every stored token received.

    `start`: position of the tail's first token. The tokens of sinks and bodies are read as the queries read them.
    """
    site, first = segments.site, segments.counted[row]
    assert segments.tail_q is not None and segments.tail_mass is not None
    length = start + used
    at = torch.arange(start, length, device=segments.tail_k.device)
    reads = _whole(segments, row, used, start)
    fresh = slice(max(first - start, 0), used)
    mass = column_mass(
        segments.tail_q[row, :, fresh],
        torch.cat([keys for keys, _ in reads], 1),
        at[fresh],
        torch.cat([places for _, places in reads], 1),
        site.attention_scale,
        site.window,
        site.softcap,
        segments.sink_logits,
        reduce=site.select.score.reduce if site.select else "mean",
        sums=segments.sums,
    )
    parts = mass.split([keys.shape[1] for keys, _ in reads], 1)
    for body, gained in zip(segments.bodies, parts[len(reads) - 1 - len(segments.bodies) :], strict=False):
        body.gain(row, gained)
    segments.tail_mass[row, :, :used] += parts[-1]
    segments.counted[row] = length


def _whole(segments: Segments, row: int, used: int, start: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys [G, n, D] and positions [G, n] of sinks (once they left the tail), bodies, and tail, as queries read them.

    `start`: position of the tail's first token. Heads are even: what overflows, or is read in chunks, is divided alike.
    """
    at = torch.arange(start, start + used, device=segments.tail_k.device)
    reads = [(r.keys, r.positions) for r in ([segments.sinks(row)] if start else [])]
    for body in segments.bodies:
        stored = _stored(body, row)
        reads.append((torch.stack([t.keys for t in stored]), torch.stack([t.positions for t in stored])))
    reads.append((segments.tail_k[row, :, :used].float(), at[None]))
    return [(keys, places.expand(segments.site.kv_heads, -1)) for keys, places in reads]


def _picked(keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, chosen: Chosen) -> list[Tokens]:
    """The chosen tokens of each KV head; keys [G, n, D], values [G, n, E], positions [n]."""
    return [Tokens(keys[g, index], values[g, index], positions[index]) for g, index in enumerate(chosen)]


def _stored(body: Body, row: int) -> list[Tokens]:
    """What a row's body holds, head by head, in float32 and as it is read."""
    decoded, site = body.decoded(row), body.site
    if decoded is None:
        empty = torch.zeros(0, device=body.device)
        blank = Tokens(empty.view(0, site.key_dim), empty.view(0, site.value_dim), empty.long())
        return [blank._replace(mass=empty if site.running else None)] * site.kv_heads
    out = []
    for g in range(site.kv_heads):
        real = slice(None) if decoded.bias is None else torch.isfinite(decoded.bias[g])
        mass = None if decoded.mass is None else decoded.mass[g, real]
        out.append(Tokens(decoded.keys[g, real], decoded.values[g, real], decoded.positions[g, real], None, mass))
    return out


def _oldest(body: Body, row: int, counts: Sequence[int]) -> list[Tokens]:
    """The tokens of the oldest pages of each KV head."""
    return [
        _taken(tokens, slice(0, count * body.cap)) for tokens, count in zip(_stored(body, row), counts, strict=True)
    ]


def _joined(old: Tokens, new: Tokens) -> Tokens:
    def both(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.cat([a, b.to(a.dtype)])

    mass = None if old.mass is None or new.mass is None else both(old.mass, new.mass)
    whole = both(old.keys, new.keys), both(old.values, new.values), both(old.positions, new.positions)
    return Tokens(*whole, None, mass)


def _taken(tokens: Tokens, index: torch.Tensor | slice) -> Tokens:
    mass = None if tokens.mass is None else tokens.mass[index]
    return Tokens(tokens.keys[index], tokens.values[index], tokens.positions[index], None, mass)
