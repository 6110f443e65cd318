"""The C++ source of attention over the segments of one cache site: its shapes and loaders put into the templates."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, TypeAlias

from ..ir.cache import Site
from ..ir.encoding.expr import indices
from .attention_body import BY_PAGES, BY_TOKENS, CODES, HELD, SCAN, WHOLE
from .attention_header import HEADER
from .attention_loaders import SPIN, TILE, Body, Form, column, dense_row, row
from .attention_template import KERNEL
from .attention_tile import ARITHMETIC
from .printers.cpp import CTYPES, LANES, scalar
from .rows_source import MATH
from .unit import Function

CHUNK = 512  # tokens of a unit of work: 64 kB of 4-bit keys and values of 128 channels
SCRATCH = 1 << 22  # floats that a step over many tokens may take, 16 MiB
LISTS = {"pages": BY_PAGES, "scan": BY_TOKENS, "reuse": BY_TOKENS}  # `dense` reads everything


Names: TypeAlias = dict[str, dict[str, str]]  # by role, what a part is called in C++


def function(site: Site) -> Function:
    """A site's kernel, whose words are the addresses of a `Buffers` and a `Call`; the same for all layers alike.

    Raises NotImplementedError where an encoding cannot be printed.
    """
    return _function(replace(site, layer=0))


@functools.lru_cache(maxsize=64)
def _function(site: Site) -> Function:
    held: list[str] = []
    scans: list[str] = []
    dispatch = []
    for at, form in enumerate(forms(site)):
        for lines, text in zip((held, scans), _body(site, at, form), strict=True):
            lines.append(text)
        dispatch.append(f"const int64_t n{at} = chunks_of(at, call, {at}, b, g, t0, queries);")
        dispatch.append(f"if (c < n{at}) return body{at}(c);\n    c -= n{at};")
    text = KERNEL.substitute(
        name="$name",
        heads=site.heads,
        groups=site.kv_heads,
        key_dim=site.key_dim,
        value_dim=site.value_dim,
        sink=site.sink,
        turn=len(site.rope.inverse) if site.rope else 0,
        turned_sink=_flag(site.compact and site.rope is not None),
        chunk=CHUNK,
        bodies=len(forms(site)),
        per=", ".join(str(pages_a_chunk(form)) for form in forms(site)) or "0",
        listed=", ".join(str(listed_a_chunk(site, form)) for form in forms(site)) or "0",
        queries=queries(site),
        stream=_flag(site.schedule == "stream_k"),
        window=site.window or 0,
        dense=CTYPES[site.dense],
        direct=_flag(_direct(site)),
        dense_keys=_lines(dense_row(site.dense, site.key_dim), 2),
        dense_values=_lines(dense_row(site.dense, site.value_dim), 2),
        tile=ARITHMETIC,
        held="".join(held),
        scans="\n".join(scans),
        dispatch=_lines(dispatch, 4),
    )
    return Function.of(f"attention.{site.heads}x{site.kv_heads}x{site.key_dim}", text, (MATH, HEADER))


def forms(site: Site) -> list[Form]:
    """The bodies of a site."""
    if site.tail is None or not site.kept:
        return []
    return [Form.of(site, number) for number in range(len(site.caps))]


def queries(site: Site) -> int:
    """New tokens that share a decoded tile: as many as keep 64 query rows in the first-level cache."""
    return max(1, min(16, 64 // site.group))


def pages_a_chunk(form: Form) -> int:
    """Pages of a body that make a unit of work."""
    return max(1, CHUNK // form.cap)


def listed_a_chunk(site: Site, form: Form) -> int:
    """Entries of a list that make a unit of work."""
    tokens = site.retrieve is not None and LISTS.get(site.retrieve.by) is BY_TOKENS
    return CHUNK if tokens else pages_a_chunk(form)


def chunks(site: Site, columns: list[int], width: int, longest: int) -> int:
    """Most chunks of a KV head whose bodies have so many columns of pages, with `width` slots of tail.

    `longest`: entries of a list, which may be read in place of the pages.
    """
    counts = [-(-many // pages_a_chunk(form)) for many, form in zip(columns, forms(site), strict=True)]
    if longest:
        counts[0] = max(counts[0], -(-longest // listed_a_chunk(site, forms(site)[0])))
    return sum(counts) - (-width // CHUNK)


def scratch(site: Site, rows: int, chunks: int, tokens: int) -> tuple[int, int]:
    """Floats of `Call.work`, and the blocks of queries that they serve at once.

    For a step of `tokens` new tokens on a batch whose rows have at most so many chunks a KV head.
    """
    padded = -(-site.value_dim // LANES) * LANES
    block = rows * chunks * site.heads * queries(site) * (padded + 2)
    blocks = max(1, min(-(-tokens // queries(site)), SCRATCH // block))
    return blocks * block, blocks


def _direct(site: Site) -> bool:
    """Whether dense rows are whole float32 vectors, which need no conversion."""
    return site.dense == "float32" and site.key_dim % LANES == 0 and site.value_dim % LANES == 0


def _lines(lines: list[str], indent: int) -> str:
    return "\n".join(" " * indent + line for line in lines)


def _flag(value: bool) -> str:
    return str(bool(value)).lower()


def _body(site: Site, at: int, form: Form) -> tuple[str, str]:
    """The scratch of body `at`, and the scan over it."""
    body = Body.of(form)
    pointers, ahead, names = _pointers(form)
    padded, wide = -(-form.key_dim // LANES) * LANES, body.tile // LANES
    zero = body.keys.zero[0] if body.keys.scale else None
    prepare = row(body.keys.scale[0], form.key_dim, "key_scale", names["keys"]) if body.keys.scale else []
    prepare += _powers(body)
    prepare += row(zero, form.key_dim, "key_zero", names["keys"]) if zero is not None else []
    factors_of_keys = [expr for expr in (*body.keys.scale, *body.keys.zero) if expr is not None]
    still = bool(factors_of_keys) and not any(TILE in at.free_symbols for e in factors_of_keys for at in indices(e))
    codes = body.columns is not None and form.value_dim % LANES == 0
    keys = f"ByColumn<{wide}>{{held.k}}" if body.columns else "ByRow{held.rows}"
    see = f"see<SPANS>(t, query, shift, bias, {keys}, Values{{held.values}}, held.a, held.z, count, live);"
    if codes:
        given = ", ".join(name for role in names.values() for name in role.values())
        alone = "see<SPANS>(t, query, shift, bias, codes, codes, held.a, held.z, count, live);"
        see = f"const Codes{at} codes = {{{given}, j, halves}};\n        if (alone) {alone}\n        else {see}"
    factors, decode = _factors(body, names), _decode(body, form, names)
    text = {
        "body": at,
        "cap": form.cap,
        "tile": body.tile,
        "spans": len(body.values.scale),
        "fold": _flag(bool(body.keys.scale)),
        "zero": _flag(zero is not None),
        "kind": "as columns" if body.columns else "as rows",
        "key_room": f"{form.key_dim} * {body.tile}" if body.columns else f"TILE * {padded}",
        "codes": _flag(codes),
        "pointers": _lines([f"{kind} {name} = {value};" for kind, name, value in pointers], 4),
        "ahead": _lines(ahead, 6),
        "factors": _lines(factors, 6),
        "decode": _lines(decode, 8),
        "once": _lines(prepare, 4) if still else "",
        "prepare": "" if still else _lines(prepare, 6),
        "still": _flag(still),
        "see": f"        {see}",
        "turned": _flag(form.turned),
        **_spins(form, pointers),
    }
    held = HELD.substitute(text)
    if codes:
        held += _codes(body, form, names, [f"{kind} {name};" for kind, name, _ in pointers], text)
    lists = LISTS.get(site.retrieve.by) if site.retrieve else None
    scan = SCAN.substitute(text) + WHOLE.substitute(text, whole="whole" if lists else "body")
    if lists is BY_TOKENS and any(form.spins):
        raise NotImplementedError("lists of tokens whose rows were rotated")
    if lists:
        token = row(form.keys.expr((form.cap, form.key_dim)), form.key_dim, "key", names["keys"])
        token += row(form.values.expr((form.cap, form.value_dim)), form.value_dim, "value", names["values"])
        scan += lists.substitute(text, token=_lines(token, 4), rows_ahead=_lines(_rows_ahead(form), 10))
    return held, scan


def _rows_ahead(form: Form) -> list[str]:
    """Statements that fetch the rows of token `n` of page `slot`, of the parts that lie by rows."""
    out = []
    for at, part in enumerate(form.parts):
        size = part.sample.numel() * part.sample.element_size()
        if part.shared or size % form.cap or part.sample.shape[1:2] != (form.cap,):
            continue
        wide = size // form.cap
        at_row = f"(const char*)in.parts[{at}] + slot * {size} + n * {wide}"
        out += [f"__builtin_prefetch({at_row} + {line});" for line in range(0, wide, 64)]
    return out


def _spins(form: Form, pointers: list[tuple[str, str, str]]) -> dict[str, str]:
    """What a scan does first, to the queries, and last, to what it has read."""
    values = {name: value for _, name, value in pointers}
    enter, leave, room = "held.q = q[0][0];", "", "1"
    if form.spins[0] is not None and not form.turned:
        room = "QUERIES * R * DP"
        enter = f"held.q = spun(held.spun, {values['keys_' + SPIN]});"
    if form.spins[1] is not None:
        leave = f"    unspin({values['values_' + SPIN]});\n"
    return {"enter": enter, "leave": leave, "spun_room": room}


def _codes(body: Body, form: Form, names: Names, members: list[str], text: dict[str, Any]) -> str:
    """A tile that is decoded where it is used."""
    assert body.columns is not None
    columns = []
    for d, part in enumerate(body.columns.print(names["keys"])):
        columns.append(f"for (int h = 0; h < W; h++) part[h] = {part};")
        columns.append(f"join<N, W>(q + {d}, part, x);")
    vectors = []
    for c in range(0, form.value_dim, LANES):
        vectors.append(f"if constexpr (C == {c}) return {column(body.values.factor, c, names['values'])};")
    dealt = body.columns.deal(names["keys"], body.tile // LANES)
    lines = {"members": _lines(members, 2), "dealt": _lines(dealt, 4)}
    lines |= {"columns": _lines(columns, 4), "vectors": _lines(vectors, 4)}
    return CODES.substitute(text, **lines)


def _powers(body: Body) -> list[str]:
    """Statements that move powers of two from columns of codes to the scale."""
    if body.columns is None or not any(body.columns.shifts):
        return []
    shifts = [*body.columns.shifts, *([0] * (-len(body.columns.shifts) % LANES))]
    powers = ", ".join(f"0x1p-{shift}f" for shift in shifts)
    return [
        f"static const float powers[DP] = {{{powers}}};",
        "for (int64_t d = 0; d < DP; d += 16)",
        "  store(key_scale + d, load<f32x16>(key_scale + d) * load<f32x16>(powers + d));",
    ]


def _factors(body: Body, names: Names) -> list[str]:
    """Statements that read the factors of values of tile `j`, and the halves that it has."""
    lines = ["const int halves = (count + 15) / 16;"]
    if body.factors:
        wide = body.tile // LANES
        lines += ["{", *body.factors.deal(names["values"], wide), f"for (int h = 0; h < {wide}; h++) {{"]
        for f, factor in enumerate(body.factors.print(names["values"])):
            lines.append(f"  store(held.{'az'[f % 2]} + {f // 2 * 32} + 16 * h, {factor});")
        return [*lines, "}", "}"]
    if body.values.scale:
        lines += ["for (int64_t i = 0; i < count; i++) {", f"  const int64_t n = j * {body.tile} + i;"]
        for span, (scale, zero) in enumerate(zip(body.values.scale, body.values.zero, strict=True)):
            lines.append(f"  held.a[{32 * span} + i] = {scalar(scale, names['values'])};")
            lines.append(f"  held.z[{32 * span} + i] = {scalar(zero, names['values']) if zero else '0'};")
        lines.append("}")
    return lines


def _decode(body: Body, form: Form, names: Names) -> list[str]:
    """Statements that decode tile `j` of a page."""
    lines, tokens = [], ["const int64_t n = j * WIDE + i;", "float* value = held.v + i * EP;"]
    if body.columns:
        wide = body.tile // LANES
        lines += [*body.columns.deal(names["keys"], wide), f"for (int h = 0; h < {wide}; h++) {{"]
        for d, part in enumerate(body.columns.print(names["keys"])):
            lines.append(f"  store(held.k + {d * body.tile} + 16 * h, {part});")
        lines.append("}")
    else:
        tokens += ["float* key = held.k + i * DP;", *row(body.keys.factor, form.key_dim, "key", names["keys"])]
        if form.spins[0] is not None and form.turned:
            tokens += ["alignas(64) float whole[DP];", f"spin<{form.key_dim}>(key, {names['keys'][SPIN]}, whole);"]
            tokens.append("memcpy(key, whole, sizeof whole);")
        if form.turned:
            tokens.append("turn(key, at.turns + 2 * TURN * (place ? place[i] : start + i));")
    tokens += row(body.values.factor, form.value_dim, "value", names["values"])
    return [*lines, "for (int64_t i = 0; i < count; i++) {", *(f"  {line}" for line in tokens), "}"]


def _pointers(form: Form) -> tuple[list[tuple[str, str, str]], list[str], Names]:
    """(type, name, value) of the pointers to a slot's parts; statements that fetch a share of the next slot's ahead;
    and the parts' names."""
    names: Names = {"keys": {}, "values": {}}
    pointers, ahead = [], []
    for at, part in enumerate(form.parts):
        dtype = str(part.sample.dtype).removeprefix("torch.")
        kind, name, many = CTYPES.get(dtype), f"{part.role}_{part.name}", part.sample.numel()
        if kind is None:
            raise NotImplementedError(f"{part.role}: the part '{part.name}' is {dtype}, which the kernel cannot read")
        place = f"g * in.steps[{at}]" if part.shared else f"slot * {many}"
        pointers.append((f"const {kind}*", name, f"(const {kind}*)in.parts[{at}] + {place}"))
        if not part.shared:
            size = many * part.sample.element_size()
            ahead.append(f"fetch<{size}>(in.parts[{at}], next, j, (fill + WIDE - 1) / WIDE);")
        names[part.role][part.name] = name
    return pointers, ahead, names
