"""Lists of what each query reads of a cache body, by C++ kernels: the best pages, or tokens that all heads vote for.

The reference is `ir/cache/retrieve.py`.
"""

from __future__ import annotations

import weakref
from ctypes import Structure, addressof, c_float, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache as cached

import torch

from ..ir.cache import Cache, Site
from ..ir.cache.body import Body
from ..ir.encoding import Dense
from ..ir.errors import SmeltError
from .attention import Picks
from .attention_header import HEADER
from .attention_loaders import Form, Part, dense_row, row, samples
from .attention_source import forms
from .printers.cpp import CTYPES, LANES
from .retrieve_header import LISTS
from .retrieve_template import PAGES, TOKENS
from .rows_source import MATH
from .unit import Call, Function, packed

CHUNK = 512  # tokens of a unit of work: 64 kB of float16 keys of 64 channels
SCRATCH = 1 << 22  # floats that a step over many tokens may take, 16 MiB
PARTS = 8  # most parts and tables of keys together


class Lookup(Structure):
    """`Lookup` of the template."""

    _fields_ = (
        *(("q", c_void_p), ("q_row", c_int64), ("q_head", c_int64), ("q_token", c_int64)),
        *(("parts", c_void_p * PARTS), ("steps", c_int64 * PARTS)),
        *((name, c_void_p) for name in ("table", "held", "pages", "places", "turns")),
        *((name, c_void_p) for name in ("positions", "picks", "count", "work")),
        *((name, c_int64) for name in ("rows", "tokens", "columns", "n", "block", "state")),
        *(("scale", c_float), ("softcap", c_float)),
    )


def retrieve(
    cache: Cache, layer: int, query: torch.Tensor, scale: float, softcap: float | None = None
) -> tuple[list[Call], Picks | None]:
    """Calls that list what the query float32 [B, H, T, D] reads of a layer's body, and the lists that attention takes.

    None: attention reads everything. The lists are filled by the calls, and get their size when these are refreshed:
    whoever holds addresses must fetch them again when the cache's `generation` changes. Layers that reuse a list must
    be bound behind the one that makes it. The window is the site's.
    """
    site = cache.plan[layer]
    if site.retrieve is None:
        return [], None
    rows, tokens = cache.batch, query.shape[2]
    made = _LISTS.setdefault(cache, {})
    if site.retrieve.by == "reuse":
        return [], _source(site, tokens, made)
    if cache.device.type != "cpu":
        raise SmeltError(f"layer {layer}: a C++ kernel reads memory of the CPU, but the cache is on {cache.device}")
    shape = (rows, site.heads, tokens, site.key_dim)
    if query.shape != shape or query.dtype is not torch.float32 or query.stride(-1) != 1:
        raise ValueError(
            f"layer {layer}: retrieval takes a float32 query {list(shape)}, contiguous in its last dim, "
            f"not {query.dtype} {list(query.shape)} with strides {query.stride()}"
        )
    each = (rows, tokens, site.kv_heads)
    picks = Picks(torch.zeros(*each, 1, dtype=torch.int32), torch.zeros(each, dtype=torch.int32))
    made[layer, tokens] = picks
    given = Lookup(tokens=tokens, rows=rows, scale=scale, softcap=softcap or 0.0)
    given.q, (given.q_row, given.q_head, given.q_token, _) = query.data_ptr(), query.stride()
    call = Call(
        function(site),
        packed((addressof(given),)),
        frozenset({query.untyped_storage().data_ptr(), ("cache", layer)}),
        frozenset({*(x.untyped_storage().data_ptr() for x in picks), "the scratch of retrieval"}),
        keeps=(given, query, picks),
        refresh=_Refresh(cache, layer, given, picks),
    )
    return [call], None if site.retrieve.by == "dense" else picks


_Made = dict[tuple[int, int], Picks]  # by layer and number of new tokens: the newest
_LISTS: weakref.WeakKeyDictionary[Cache, _Made] = weakref.WeakKeyDictionary()


def _source(site: Site, tokens: int, made: _Made) -> Picks:
    """The list that a site reads; the cache has seen to it that it means the same tokens there."""
    assert site.retrieve is not None and site.retrieve.source is not None
    source = site.retrieve.source
    if (source, tokens) not in made:
        raise SmeltError(f"layer {site.layer} reads the list of layer {source}, which must run before it")
    return made[source, tokens]


def function(site: Site) -> Function:
    """A site's kernel, whose word is the address of a `Lookup`; layers that store keys alike share it."""
    assert site.retrieve is not None
    shape = site.heads, site.kv_heads, site.key_dim, site.window or 0
    if site.retrieve.by == "pages":
        return _pages(*shape, site.kept, site.retrieve.budget // site.kept)
    return _tokens(*shape, site.retrieve.budget, len(site.rope.inverse) if site.rope else 0, _form(site))


def _form(site: Site) -> Form:
    (form,) = forms(site)
    return form


@cached
def _pages(heads: int, groups: int, dim: int, window: int, cap: int, most: int) -> Function:
    text = PAGES.substitute(
        name="$name",
        heads=heads,
        groups=groups,
        dim=dim,
        window=window,
        cap=cap,
        most=most,
        queries=_queries(heads // groups),
        bound_row=_lines(dense_row("float16", dim)),
    )
    return Function.of(f"retrieve.pages.{heads}x{groups}x{dim}", text, (MATH, HEADER, LISTS))


_VECTORS = {
    "float32": "load<f32x16>(x)",
    "float16": "f16_to_f32(load<u16x16>(x))",
    "bfloat16": "bf16_to_f32(load<u16x16>(x))",
}


@cached
def _tokens(heads: int, groups: int, dim: int, window: int, most: int, turn: int, form: Form) -> Function:
    pointers, ahead, names = [], [], {}
    for number, part in enumerate(_parts(form)):
        dtype = str(part.sample.dtype).removeprefix("torch.")
        kind, names[part.name] = CTYPES.get(dtype), f"key_{part.name}"
        if kind is None or number == PARTS:
            raise SmeltError(f"keys {form.keys}: the part '{part.name}', {dtype}, is none that the kernel can read")
        place = f"{'g' if part.shared else 'slot'} * at.steps[{number}]"
        pointers.append(f"const {kind}* key_{part.name} = (const {kind}*)at.parts[{number}] + {place};")
        if not part.shared:
            size = part.sample.numel() * part.sample.element_size()
            ahead.append(f"  fetch<{size}>(at.parts[{number}], next, part, CAP / 16);")
    dtype = "float32"
    if direct := isinstance(form.keys, Dense) and dim % LANES == 0 and not form.turned:
        dtype = form.keys.dtype
    text = TOKENS.substitute(
        name="$name",
        direct=str(direct).lower(),
        dense=CTYPES[dtype],
        vector=_VECTORS[dtype],
        ahead=_lines(ahead, 4),
        heads=heads,
        groups=groups,
        dim=dim,
        window=window,
        cap=form.cap,
        most=most,
        chunk=CHUNK,
        turned=turn if form.turned else 0,
        queries=_queries(heads // groups),
        pointers=_lines(pointers),
        decode=_lines(row(form.keys.expr((form.cap, dim)), dim, "key", names)),
    )
    return Function.of(f"retrieve.tokens.{heads}x{groups}x{dim}", text, (MATH, HEADER, LISTS))


def _parts(form: Form) -> list[Part]:
    """The parts and tables of keys that their expression reads."""
    return [part for part in form.parts if part.role == "keys"]


def _queries(group: int) -> int:
    """New tokens that share a decoded tile: as many as keep 64 query rows in the first-level cache."""
    return max(1, min(16, 64 // group))


def _lines(lines: list[str], indent: int = 2) -> str:
    return "\n".join(" " * indent + line for line in lines)


_WORK: weakref.WeakKeyDictionary[Cache, torch.Tensor] = weakref.WeakKeyDictionary()


def _work(cache: Cache, size: int) -> torch.Tensor:
    """Scratch, shared by the layers of a cache: at least so many floats."""
    held = _WORK.get(cache)
    if held is None or held.numel() < size:
        held = _WORK[cache] = torch.empty(size)
    return held


@dataclass
class _Refresh:
    """The step's addresses, and when the cache's `generation` changes those of buffers and lists, as long as needed."""

    cache: Cache
    layer: int
    given: Lookup
    picks: Picks
    generation: int = -1
    held: tuple[torch.Tensor | None, ...] = ()

    def __call__(self) -> None:
        if self.cache.step is None:
            raise RuntimeError("no step: call begin before listing what it reads")
        self.given.positions, _ = self.cache.step.addresses
        if self.cache.generation == self.generation:
            return
        given, segments = self.given, self.cache.segments[self.layer]
        site, (body,) = segments.site, segments.bodies
        assert site.retrieve is not None
        pages = site.retrieve.by == "pages"
        sides = [(body.side[name], site.key_dim) for name in ("low", "high")] if pages else []
        parts = sides or [_held(part, body, _form(site)) for part in _parts(_form(site))]
        for number, (part, step) in enumerate(parts):
            given.parts[number], given.steps[number] = part.data_ptr(), step
        turns = self.cache.turns(self.layer)
        for name, x in (("table", body.table), ("held", body.held), ("pages", body.pages), ("places", body.places)):
            setattr(given, name, x.data_ptr() if x is not None else None)
        given.turns = turns.data_ptr() if turns is not None else None
        given.columns = body.table.shape[2]
        self._make(given.columns if pages else given.columns * site.kept, site, pages)
        work = _work(self.cache, given.block * given.rows * given.state)
        given.work = work.data_ptr()
        self.held = (work, turns, *(part for part, _ in parts), body.table, body.held, body.pages, body.places)
        self.generation = self.cache.generation

    def _make(self, entries: int, site: Site, pages: bool) -> None:
        """The size of lists, and of the scratch, for a body of so many pages or tokens."""
        assert site.retrieve is not None
        given, most = self.given, site.retrieve.budget // (site.kept if pages else 1)
        given.n = min(most, entries)
        self.picks.entries.resize_(given.rows, given.tokens, site.kv_heads, given.n)
        given.picks, given.count = (x.data_ptr() for x in self.picks)
        if pages:
            given.state = site.kv_heads * _whole(entries)
        else:
            given.state = -(-entries // CHUNK) * ((site.heads + 1) * CHUNK + 2 * _whole(site.heads))
        longest = given.tokens if entries > most else 0
        given.block = min(longest, _queries(site.group), max(1, SCRATCH // (given.rows * given.state)))


def _held(part: Part, body: Body, form: Form) -> tuple[torch.Tensor, int]:
    """Where a part of keys lies, and the numbers from one slot, or one KV head, to the next."""
    if not part.shared:
        return body.keys[part.name], part.sample.numel()
    table = body.tables["keys"].get(part.name)  # who needs no data may have left its table out
    table = samples(form.keys, form.cap, form.key_dim)[1][part.name] if table is None else table
    return table, table.stride(0) if table.shape[0] > 1 else 0


def _whole(count: int) -> int:
    return -(-count // LANES) * LANES
