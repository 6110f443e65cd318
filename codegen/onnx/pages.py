"""Attention over a site with pages, inside the graph: read the segments, then let due pages leave, encoded.

Nothing depends on rows being equally long. Between steps a row's dense tokens lie in slots 0 … n - 1: sinks, then the
tail. The step's new tokens are joined behind all W slots, and a place among the n + T becomes an index in that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...ir.cache import Site
from ...ir.encoding import Affine, Encoding
from . import state
from .builder import Builder, Operand, Value, onnx_type
from .codes import FLOAT, decoded_pages, encoded_pages
from .sizes import shape, size_of

INT64, INT32 = 7, 6  # TensorProto.INT64, INT32
NEVER = 1 << 40  # a rank that no query sees


@dataclass(frozen=True)
class Timing:
    """Per row of a schedule, [B]: dense tokens n, pages in the body, pages that leave; and where tokens come from.

    `ranks` [B, S] and `limit` [1, 1, T, 1]: a query sees what has a rank up to its limit. `held`: most pages of a row,
    [1]. `rows`: [B, W] indices of the next dense state. `due` [n, 2]: row and slot of each page that leaves, `sources`
    [n, page, 2] the row and index of its tokens, `starts` [n] its first position.
    """

    ranks: str
    limit: str
    held: str | None
    shift: str
    rows: str
    due: str | None
    sources: str | None
    starts: str | None


def timing(b: Builder, site: Site, body: str | None) -> Timing:
    """What all sites of a schedule share; `body` is one of its page buffers, for P."""
    step = b.shared["step"]
    width, limit = state.width(site), state.slots(site)
    assert site.tail is not None

    stays = site.sink + site.tail

    def flushed(lengths: str) -> Any:
        beyond = b.op("Max", b.op("Sub", lengths, b.const(stays)), b.const(0))
        return b.op("Div", beyond, b.const(site.page))

    before, after = flushed(step["lengths"]), flushed(step["after"])
    gone = b.op("Mul", before, b.const(site.page))
    dense = b.op("Sub", step["lengths"], gone)  # n [B]
    leaving = b.op("Sub", after, before)
    column = b.op("Unsqueeze", dense, b.const([1]))
    slots = b.const(np.arange(width)[None])

    def index(place: Any, dense: Any) -> Any:
        """Where the token at a place among n + T lies in the joined state and new tokens."""
        moved = b.op("Add", b.op("Sub", place, dense), b.const(width))
        last = b.op("Add", size_of(b, step["tokens"], 1), b.const(width - 1))
        return b.op("Min", b.op("Where", b.op("Less", place, dense), place, moved), last)

    jump = b.op("Mul", b.op("Unsqueeze", leaving, b.const([1])), b.const(site.page))
    behind = b.const((np.arange(width)[None] >= site.sink).astype(np.int64))
    rows = b.op("Unsqueeze", index(b.op("Add", slots, b.op("Mul", behind, jump)), column), b.const([2]))
    ranks = [b.op("Where", b.op("Less", slots, column), b.const(0), b.const(NEVER))]
    new = b.op("Add", step["new"], b.const(1))
    ranks.append(b.op("Expand", new, b.op("Shape", step["tokens"])))
    seen = b.op("Unsqueeze", new, b.const([0, 3]))  # [1, 1, T, 1]
    held = due = sources = starts = None
    if body is not None:
        room = size_of(b, body, 1)
        holds = before if limit is None else b.op("Min", before, room)
        held = b.op("ReduceMax", holds, keepdims=1)
        pages = b.op("Unsqueeze", _range(b, held), b.const([0]))  # [1, n]
        rank = b.op("Where", b.op("Less", pages, b.op("Unsqueeze", holds, b.const([1]))), b.const(0), b.const(NEVER))
        wide = b.op("Expand", b.op("Unsqueeze", rank, b.const([2])), b.const([1, 1, site.kept]))
        ranks.insert(0, b.op("Reshape", wide, b.const([0, -1])))
        due, sources, starts = _due(b, site, before, leaving, room if limit is not None else None, dense, index)
    joined = b.op("Concat", *ranks, axis=1)
    return Timing(joined, seen, held, gone, rows, due, sources, starts)


def _due(b: Builder, site: Site, before: Any, leaving: Any, room: Any, dense: Any, index: Any) -> tuple[str, str, str]:
    """The pages that leave in this step: their rows and slots, their tokens, their first positions."""
    candidates = b.op("Unsqueeze", _range(b, b.op("ReduceMax", leaving, keepdims=1)), b.const([0]))
    count = b.op("Unsqueeze", leaving, b.const([1]))
    leaves = b.op("Less", candidates, count)
    if room is not None:  # what the budget drops at once is not encoded
        leaves = b.op("And", leaves, b.op("GreaterOrEqual", candidates, b.op("Sub", count, room)))
    row, page = (
        b.op("Squeeze", part, b.const([0]))
        for part in b.op("Split", b.op("NonZero", leaves), b.const([1, 1]), axis=0, outputs=2)
    )
    number = b.op("Add", b.op("Gather", before, row), page)  # of the row, from its first page on
    slot = number if room is None else b.op("Mod", number, room)
    due = b.op("Concat", b.op("Unsqueeze", row, b.const([1])), b.op("Unsqueeze", slot, b.const([1])), axis=1)
    inside = b.const(np.arange(site.page)[None] + site.sink)
    place = b.op("Add", b.op("Unsqueeze", b.op("Mul", page, b.const(site.page)), b.const([1])), inside)
    at = index(place, b.op("Unsqueeze", b.op("Gather", dense, row), b.const([1])))
    owner = b.op("Expand", b.op("Unsqueeze", row, b.const([1])), b.op("Shape", at))
    sources = b.op("Concat", b.op("Unsqueeze", owner, b.const([2])), b.op("Unsqueeze", at, b.const([2])), axis=2)
    starts = b.op("Add", b.op("Mul", number, b.const(site.page)), b.const(site.sink))
    return str(due), str(sources), str(starts)


def _range(b: Builder, count: Any) -> Any:
    """0 … count - 1 for a size [1]."""
    return b.op("Range", b.const(np.array(0)), b.op("Squeeze", count), b.const(np.array(1)))


def read_and_store(b: Builder, site: Site, key: Value, value: Value) -> tuple[str, str, str, str, str | None]:
    """Keys and values [B, G, S, D] in float32 that a step sees, ranks and limit, and positions if a window asks.

    Registers the buffers behind the step as outputs.
    """
    lead, buffers = str(site.layer), state.buffers(b, site)
    pasts = {name: f"past.{name}" for name in buffers}
    first = next(
        (pasts[n] for n in buffers if n.split(".", 1)[1].startswith("keys.") and not n.endswith(".dense")), None
    )
    when: Timing = b.once(("timing", state.schedule(site)), lambda: timing(b, site, first))
    kind = onnx_type(getattr(torch, site.dense))
    joined, read = {}, {}
    for role, new in (("keys", key), ("values", value)):
        fresh = b.op("Transpose", new, perm=[0, 2, 1, 3])
        fresh = fresh if kind == FLOAT else b.op("Cast", fresh, to=kind)
        joined[role] = b.op("Concat", pasts[f"{lead}.{role}.dense"], fresh, axis=1)
        wide = joined[role] if kind == FLOAT else b.op("Cast", joined[role], to=FLOAT)
        read[role] = b.op("Transpose", wide, perm=[0, 2, 1, 3])
    places = None
    if when.held is not None:
        for role, encoding, dim in state.roles(site):
            names = state.parts(b, site, role, encoding, dim)
            held = {part: _held(b, pasts[f"{lead}.{role}.{part}"], when) for part in names}
            pages = _decoded(b, encoding, held, site.kept, dim)  # [B, n, G, kept, D]
            turned = b.op("Transpose", pages, perm=[0, 2, 1, 3, 4])
            flat = b.op("Reshape", turned, b.const([0, 0, -1, dim]))
            read[role] = b.op("Concat", flat, read[role], axis=2)
    if site.window is not None:
        places = _positions(b, site, when, pasts)
    _store(b, site, when, joined, pasts, buffers)
    return read["keys"], read["values"], when.ranks, when.limit, places


def _held(b: Builder, buffer: str, when: Timing) -> str:
    """The slots of a page buffer that some row uses."""
    return str(b.op("Slice", buffer, b.const([0]), when.held, b.const([1])))


def _decoded(b: Builder, encoding: Encoding, parts: dict[str, str], rows: int, columns: int) -> str:
    """Pages [B, P, G, kept, D] as float32."""
    if isinstance(encoding, Affine):
        return decoded_pages(b, encoding, parts, 3, rows, columns)
    return parts["data"] if encoding.dtype == "float32" else str(b.op("Cast", parts["data"], to=FLOAT))  # type: ignore[attr-defined]


def _positions(b: Builder, site: Site, when: Timing, pasts: dict[str, str]) -> str:
    """Positions of everything read, [B, 1 or H, 1, S]."""
    step = b.shared["step"]
    width = state.width(site)
    behind = b.const((np.arange(width)[None] >= site.sink).astype(np.int64))
    dense = b.op(
        "Add", b.const(np.arange(width)[None]), b.op("Mul", behind, b.op("Unsqueeze", when.shift, b.const([1])))
    )
    near = b.op("Concat", dense, step["positions"], axis=1)
    near = b.op("Unsqueeze", near, b.const([1, 2]))  # [B, 1, 1, W + T]
    if when.held is None:
        return str(near)
    body = b.op("Cast", _held(b, pasts[f"{site.layer}.places"], when), to=INT64)  # [B, n, G, kept]
    body = b.op("Reshape", b.op("Transpose", body, perm=[0, 2, 1, 3]), b.const([0, 0, 1, -1]))  # [B, G, 1, n · kept]
    if not site.scattered:  # all heads keep the same
        body = b.op("Slice", body, b.const([0]), b.const([1]), b.const([1]))
        return str(b.op("Concat", body, near, axis=3))
    heads = b.op("Expand", b.op("Unsqueeze", body, b.const([2])), b.const([1, 1, site.group, 1, 1]))
    heads = b.op("Reshape", heads, b.const([0, site.heads, 1, -1]))
    near = b.op("Expand", near, b.const([1, site.heads, 1, 1]))
    return str(b.op("Concat", heads, near, axis=3))


def _store(
    b: Builder, site: Site, when: Timing, joined: dict[str, str], pasts: dict[str, str], buffers: dict[str, Any]
) -> None:
    """The buffers behind the step: the dense state moved up, pages that leave encoded into their slots."""
    lead, present = str(site.layer), b.shared["present"]
    made: dict[str, Any] = {}
    chosen = None
    for role, encoding, dim in state.roles(site):
        made[f"{lead}.{role}.dense"] = b.op("GatherND", joined[role], when.rows, batch_dims=1)
        if when.due is None:
            continue
        page = b.op("Transpose", b.op("GatherND", joined[role], when.sources), perm=[0, 2, 1, 3])  # [n, G, page, D]
        page = page if site.dense == "float32" else b.op("Cast", page, to=FLOAT)
        if site.scattered:
            chosen = _survivors(b, site, page) if chosen is None else chosen
            spread = b.op("Unsqueeze", chosen, b.const([3]))
            spread = b.op("Expand", spread, b.const([1, 1, 1, dim]))
            page = b.op("GatherElements", page, spread, axis=2)
        elif site.kept < site.page:
            page = b.op("Slice", page, b.const([site.page - site.kept]), b.const([site.page]), b.const([2]))
        for part, value in _encoded(b, encoding, page, site.kept, dim).items():
            made[f"{lead}.{role}.{part}"] = b.op("ScatterND", pasts[f"{lead}.{role}.{part}"], when.due, value)
    if state.placed(site) and when.due is not None:
        made[f"{lead}.places"] = _placed(b, site, when, chosen, pasts[f"{lead}.places"])
    for name, (dtype, dims) in buffers.items():
        present[name] = (made[name], onnx_type(dtype), dims)


def _encoded(b: Builder, encoding: Encoding, page: Operand, rows: int, columns: int) -> dict[str, Any]:
    if isinstance(encoding, Affine):
        return dict(encoded_pages(b, encoding, page, 2, rows, columns))
    kind = onnx_type(getattr(torch, encoding.dtype))  # type: ignore[attr-defined]  # Dense
    return {"data": page if kind == FLOAT else b.op("Cast", page, to=kind)}


def _survivors(b: Builder, site: Site, page: Operand) -> Any:
    """Indices [n, G, kept] of the lowest key norms of a page, in position order; ties go to the earlier token."""
    norms = b.op("ReduceSum", b.op("Mul", page, page), b.const([3]), keepdims=0)
    count = b.const([site.kept])
    lowest = b.op("TopK", norms, count, axis=2, largest=0, sorted=1, outputs=2)[1]
    return b.op("TopK", lowest, count, axis=2, largest=0, sorted=1, outputs=2)[0]


def _placed(b: Builder, site: Site, when: Timing, chosen: Any, past: str) -> Any:
    """The positions of the survivors of pages that leave, stored."""
    starts = b.op("Unsqueeze", when.starts, b.const([1, 2]))  # [n, 1, 1]
    if chosen is None:
        inside = b.const(np.arange(site.page - site.kept, site.page)[None, None])
        places = b.op("Add", starts, inside)
        sizes = shape(b, [size_of(b, when.due, 0), site.kv_heads, site.kept])
        places = b.op("Expand", places, sizes)
    else:
        places = b.op("Add", starts, chosen)
    return b.op("ScatterND", past, when.due, b.op("Cast", places, to=INT32))
