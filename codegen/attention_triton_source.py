"""The Triton source of attention over the segments of one cache site: its shapes and loaders put into the templates.

Keys that were stored before their rotation are read as two tiles, of the columns that turn together: logits are a sum
of products over pieces of the columns, so that nothing crosses a tile. Where tokens of a page are neighbours, their
angles are that of a tile's first token plus that of their place in it: the first rows of the table of angles, which
stay close, and one more serve a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from textwrap import indent
from typing import Any

from ..ir.cache import Site
from ..ir.encoding.expr import Bin, Cast, Expr, Load, Take, k, n, substitute
from .attention_loaders import SPIN, Form, Part
from .attention_source import forms
from .attention_triton_bodies import KEYS, LISTED, PAGE, PAGES, SPUN, SPUN_SCAN, TOKEN, TOKENS, VALUES, WHOLE
from .attention_triton_columns import tile
from .attention_triton_pieces import Pieces, angles, lined, neighbours, padded, products, query
from .attention_triton_template import KERNEL, KEY_ROWS, SINK_SCAN
from .printers import triton as printer
from .product_triton import POINTERS

TILE = 32  # tokens of a tile
LOOKED_UP = 16  # tokens of a tile of rows that turn, or were rotated, and come out of tables: addresses of 64 bits
ROWS = 16  # query rows of a program: the fewest that tl.dot takes; from 32 on, 128 channels spill on sm_80 and sm_90
PIECES = 16  # pieces of a unit that are merged at once
LISTS = {"pages": "pages", "scan": "tokens", "reuse": "tokens"}  # what entries of a site's lists are


@dataclass(frozen=True)
class Scan:
    """Body `number` of a site, and how its tiles are read."""

    site: Site
    number: int
    form: Form

    @property
    def lists(self) -> str | None:
        """What the entries of lists are, where the site reads by lists."""
        return LISTS.get(self.site.retrieve.by) if self.site.retrieve else None

    @property
    def tiles(self) -> int:
        """Tiles of a page."""
        return -(-self.form.cap // self.tile)

    @cached_property
    def tile(self) -> int:
        """Tokens of a tile."""
        moved = self.form.turned or any(self.form.spins)
        looked_up = moved and any(takes(expr) for _, _, expr, _ in self._columns())
        return LOOKED_UP if looked_up else TILE

    @property
    def parameters(self) -> dict[str, str]:
        """What the kernel needs of the body, with Triton's types."""
        at = self.number
        found = {self.name(part): POINTERS[str(part.sample.dtype).removeprefix("torch.")] for part in self.form.parts}
        found |= {f"{self.name(part)}_step": "i32" for part in self.form.parts if part.shared and part.name != SPIN}
        found |= {f"pages{at}": "*i32", f"table{at}": "*i32", f"P{at}": "i32"}
        found |= {f"places{at}": "*i32"} if self.site.places else {}
        return found | ({f"bias{at}": "*fp32"} if self.site.weighs else {})

    def name(self, part: Part) -> str:
        """A part's parameter."""
        return f"{part.role}{self.number}_{part.name}"

    def _of(self, role: str) -> list[Part]:
        return [part for part in self.form.parts if part.role == role and part.name != SPIN]

    def _here(self, role: str, slot: str) -> str:
        """The parts at a slot, as arguments; tables are those of the KV head.

        No slot is negative: what is added to a table keeps the compiler from holding it in registers over the loop.
        """
        head = " + tl.minimum(slot, 0)" if slot == "slot" else ""
        steps = {
            part: f"g * {self.name(part)}_step{head}" if part.shared else f"{slot} * {part.sample.numel()}"
            for part in self._of(role)
        }
        return ", ".join(f"{self.name(part)} + {step}" for part, step in steps.items())

    def _columns(self) -> Iterator[tuple[str, int | None, Expr, int]]:
        """(role, piece, expression over its columns, how many) of keys and values."""
        cap, form = self.form.cap, self.form
        keys = form.keys.expr((cap, form.key_dim))
        for piece, (first, count) in enumerate(Pieces.of(self.site).spans):
            yield "keys", piece, substitute(keys, {k: k + first}) if first else keys, count
        yield "values", None, form.values.expr((cap, form.value_dim)), form.value_dim

    def loaders(self) -> str:
        """The functions that decode a tile of a page, and a tile of listed tokens."""
        out = []
        for role, piece, expr, count in self._columns():
            names = {part.name: self.name(part) for part in self._of(role)}
            text = {"body": self.number, "piece": piece, "parts": ", ".join(names.values()), "pad": padded(count)}
            lines = tile(expr, count, padded(count), self.tile, self.form.cap, names)
            out.append((VALUES if piece is None else KEYS).substitute(text, lines=lines))
            if self.lists == "tokens":
                value = printer.text(expr, names, column_mask=_inside(count))
                out.append(TOKEN.substitute(text, role=role if piece is None else f"{role}_{piece}", value=value))
        return "".join(out)

    def scan(self) -> str:
        """The loops over the body's tiles."""
        text: dict[str, Any] = {"body": self.number, "tiles": self.tiles, "tile": self.tile, "cap": self.form.cap}
        text |= {"groups": self.site.kv_heads, "group": self.site.group, "keys": Pieces.of(self.site).names("key")}
        text["queries"] = Pieces.of(self.site).names("query")
        whole = WHOLE.substitute(text, page=self._page(text))
        if self.lists is None:
            return self._spun(whole)
        if self.lists == "pages":
            read = PAGES.substitute(text, page=indent(self._page(text), 4 * " "))
            some = f"some * {self.tiles}"
        else:
            read, some = self._tokens(text), f"(some + {self.tile - 1}) // {self.tile}"
        listed = LISTED.substitute(text, longest=self.longest, some=some, read=read)
        return self._spun(f"        if N is None:\n{indent(whole, 4 * ' ')}        else:\n{indent(listed, 4 * ' ')}")

    def _spun(self, scan: str) -> str:
        """The loops over a body, in its frame."""
        keys, values = self.form.spins
        into, back = [], []
        if values is not None:
            dim = self.site.value_dim
            rest = f"M, {dim}, {padded(dim)}"
            call = f"acc = spun_value(acc, own, inside[:, None], values{self.number}_{SPIN}"
            into += ["if low < before:", f"    {call}, True, {rest})"]
            back += [f"{call}, False, {rest})"]
        if keys is not None:
            into += self.spun_query
            back += query(Pieces.of(self.site))
        if not into:
            return scan
        text = {"body": self.number, "value_dim": self.site.value_dim, "scan": scan.rstrip("\n")}
        return SPUN_SCAN.substitute(text, into=lined(into, 12), back=lined(back, 12))

    @property
    def spun_query(self) -> list[str]:
        """Lines that set a query as rotated keys meet it."""
        dim = self.site.key_dim
        rest = f"keys{self.number}_{SPIN}, False, M, {dim}, {padded(dim)}"
        return [f"query_0 = spun(q + heads[:, None], inside[:, None], {rest}) * scale"]

    @property
    def longest(self) -> str:
        """Tiles of a list as long as it may be."""
        return f"N * {self.tiles}" if self.lists == "pages" else f"((N + {self.tile - 1}) // {self.tile})"

    def _page(self, text: dict[str, Any]) -> str:
        """Lines that read tile `j` of the page at `slot`."""
        site, at = self.site, self.number
        turned, lines = self.form.turned, []
        if site.places:
            lines.append(f"place = tl.load(places{at} + slot * {self.form.cap} + token, mask=token < fill, other=0)")
        elif turned or site.window:
            lines.append(f"base = tl.load(pages{at} + 2 * slot + 1) + j * {self.tile}")
        if site.window:
            place = "place" if site.places else f"(base + tl.arange(0, {self.tile}))"
            lines.append(f"live = live & (at[:, None] - {place}[None, :] < {site.window})")
        if turned and site.places:
            lines.append("cos, sin = angles(turns, place[:, None], (token < fill)[:, None])")
        elif turned:
            lines += neighbours(f"fill - j * {self.tile}", self.tile)
        return PAGE.substitute(
            text,
            window=lined(lines, 12),
            keys_here=self.page_keys(12, turned),
            bias=self._bias("slot", "token", "token < fill"),
            values_here=self._here("values", "slot"),
        )

    def page_keys(self, spaces: int, turned: bool) -> str:
        """Lines that set the keys of tile `j` of the page at `slot`."""
        call = f"page_keys{self.number}_{{}}({self._here('keys', 'slot')}, j)"
        return Pieces.of(self.site).keys(call, spaces, turned)

    def _tokens(self, text: dict[str, Any]) -> str:
        """Lines that read a tile of listed tokens."""
        site, at, pieces, lines = self.site, self.number, Pieces.of(self.site), []
        if site.places:
            lines.append(f"at_token = tl.load(places{at} + slot * {self.form.cap} + n)")
        elif self.form.turned or site.window:
            lines.append(f"at_token = tl.load(pages{at} + 2 * slot + 1) + n")
        if site.window:
            lines.append(f"live = live & (at[:, None] - at_token[None, :] < {site.window})")
        if self.form.turned:
            lines.append("cos, sin = angles(turns, at_token[:, None], (place < some)[:, None])")
        return TOKENS.substitute(
            text,
            window=lined(lines, 16),
            keys_here=pieces.keys(f"token_keys_{{}}({self._here('keys', 'here')}, n)", 16, self.form.turned),
            bias=self._bias("slot", "entry % " + str(self.form.cap), "place < some"),
            values_here=self._here("values", "here"),
        )

    def _bias(self, slot: str, token: str, live: str) -> str:
        if not self.site.weighs:
            return ""
        where = f"bias{self.number} + {slot} * {self.form.cap} + {token}"
        return f" + tl.load({where}, mask={live}, other=0)[None, :]"


def scans(site: Site) -> list[Scan]:
    """The bodies of a site."""
    made = [Scan(site, number, form) for number, form in enumerate(forms(site))]
    if any(scan.form.turned and scan.form.spins[0] for scan in made):
        raise NotImplementedError("keys that turn by their positions when they are read, in rows that were rotated")
    return made


def sizes(site: Site) -> dict[str, str]:
    """What the numbers of tiles follow from, with Triton's types."""
    bodies = scans(site)
    found = {"counts": "*i32", **({"sink_at": "*i32"} if site.compact else {})}
    found |= {f"held{scan.number}": "*i32" for scan in bodies}
    return found | ({"N": "i32"} if any(scan.lists for scan in bodies) else {})


def parameters(site: Site, sinks: bool = False, lists: bool = False) -> dict[str, dict[str, str]]:
    """Triton's type of every argument of both kernels that is no constant, in order."""
    bodies, dense = scans(site), POINTERS[site.dense]
    numbers = dict.fromkeys(("out_row", "out_head", "out_token", "B", "T"), "i32")
    held = sizes(site)
    held |= {} if lists or "N" not in held else {"N": "constexpr"}
    listed = dict.fromkeys(("picks", "picked"), "*i32" if lists else "constexpr") if "N" in held else {}
    turns = {"turns": "*fp32"} if site.rope is not None and site.frame == "pre" else {}
    attend = {
        **dict.fromkeys(("q", "out", "work", "stats"), "*fp32"),
        **dict.fromkeys(("sink_k", "sink_v", "tail_k", "tail_v"), dense),
        **{name: kind for scan in bodies for name, kind in scan.parameters.items()},
        **{**held, **listed, **turns, "positions": "*i64", "visible": "*i64"},
        **{"sinks": "*fp32" if sinks else "constexpr"},
        **dict.fromkeys(("q_row", "q_head", "q_token"), "i32"),
        **{**numbers, "W": "i32", "scale": "fp32", "softcap": "fp32"},
    }
    scratch = dict.fromkeys(("work", "stats", "out"), "*fp32")
    return {"attend": attend, "merge": {**scratch, **held, "sinks": attend["sinks"], **numbers, "P": "i32"}}


def source(site: Site) -> str:
    """The kernels `attend` and `merge` of a site as a Python module; NotImplementedError where it cannot be printed."""
    bodies, pieces = scans(site), Pieces.of(site)
    dense = _dense(site.dense, site.key_dim)
    rows = [
        KEY_ROWS.substitute(piece=i, pad=padded(count), value=_tile(substitute(dense, {k: k + first}), count, "live"))
        for i, (first, count) in enumerate(pieces.spans)
    ]
    turns = bool(pieces.spans[1:])
    text: dict[str, Any] = {
        "site": site,
        "heads": site.heads,
        "groups": site.kv_heads,
        "group": site.group,
        "key_dim": site.key_dim,
        "value_dim": site.value_dim,
        "value_pad": padded(site.value_dim),
        "dense_keys": "".join(rows),
        "dense_value": _tile(_dense(site.dense, site.value_dim), site.value_dim, "live"),
        "loaders": (angles(pieces) if turns else "")
        + (SPUN if any(any(scan.form.spins) for scan in bodies) else "")
        + "".join(scan.loaders() for scan in bodies),
        "compute": site.dense,
        "sink": site.sink,
        "window": site.window or 0,
        "tile": TILE,
        "pieces": PIECES,
        "queries": pieces.names("query"),
        "keys": pieces.names("key"),
        "products": lined(products(site, pieces), 4),
        "query": lined(query(pieces), 8),
        "sizes": ", ".join(sizes(site)),
        "sink_first": " + tl.load(sink_at + pair, mask=here, other=0)" if site.compact else "",
        "body_tiles": "\n".join(_many(scan) for scan in bodies),
        "bodies": "".join(f"n_body{scan.number}, " for scan in bodies),
        "body_sum": " + ".join(f"n_body{scan.number}" for scan in bodies) or "0",
        "body_scans": "".join(f"{scan.scan()}        before += n_body{scan.number}\n" for scan in bodies),
        "whole_keys": pieces.keys(f"key_rows_{{}}(tail_k + first * {site.key_dim}, n, n >= 0)", 12, False),
        "new_keys": pieces.keys(f"key_rows_{{}}(tail_k + first * {site.key_dim}, n, holds[:, None])", 12, False),
    }
    for name, kinds in zip(("parameters", "merged"), parameters(site).values(), strict=True):
        text[name] = ",\n    ".join(_wrapped(list(kinds)))
    text["sink_scan"] = _sinks(site, pieces, text) if site.sink else ""
    return KERNEL.substitute(text)


def _many(scan: Scan) -> str:
    """Lines that set the number of a body's tiles: of a KV head's pages, or of a unit's lists."""
    count = f"n_body{scan.number} = tl.load(held{scan.number} + pair, mask=here, other=0) * {scan.tiles}"
    if scan.lists is None:
        return f"    {count}"
    group, tokens = scan.site.group, ROWS // scan.site.group
    if ROWS % group:
        tokens = 1 if group % ROWS == 0 else (ROWS - 2) // group + 2
    listed = f"n_body{scan.number} = n_sink * 0 + tl.minimum(T, {tokens}) * {scan.longest}"
    return f"    if N is None:\n        {count}\n    else:\n        {listed}"


def _sinks(site: Site, pieces: Pieces, text: dict[str, Any]) -> str:
    """The scan over the sinks, which compact sites keep un-rotated."""
    base = f"base = tl.load(sink_at + pair) + tile * {TILE}" if site.compact else f"base = tile * {TILE}"
    turned = site.compact and site.rope is not None
    lines = [base, *(neighbours(f"n_sink - tile * {TILE}", TILE) if turned else [])]
    call = f"key_rows_{{}}(sink_k + pair * {site.sink * site.key_dim}, n, n < n_sink)"
    here = pieces.keys(call, 12, turned)
    return SINK_SCAN.substitute(text, first=lined(lines, 12), keys_here=here)


def takes(expr: Expr) -> bool:
    """Whether a value comes out of a table, at a place that is computed."""
    match expr:
        case Take():
            return True
        case Bin(_, a, b):
            return takes(a) or takes(b)
        case Cast(_, a):
            return takes(a)
    return False


def _dense(dtype: str, dim: int) -> Expr:
    stored = Load("x", n * dim + k, dtype)
    return stored if dtype == "float32" else Cast("float32", stored)


def _tile(expr: Expr, count: int, rows: str) -> str:
    return printer.text(expr, row_mask=f"({rows})", column_mask=f"(k < {count})")


def _inside(count: int) -> str:
    return f"(k < {count})" if count < padded(count) else ""


def _wrapped(names: list[str]) -> list[str]:
    """Names by eight a line."""
    return [", ".join(names[i : i + 8]) for i in range(0, len(names), 8)]
