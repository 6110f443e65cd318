"""The C++ source of attention over the segments of one cache site: its shapes and loaders put into the template."""

from __future__ import annotations

import torch

from ..ir.cache import Site
from .attention_header import HEADER
from .attention_loaders import Body, dense_row, row
from .attention_template import BODY, EMPTY_BODY, KERNEL
from .printers.cpp import CTYPES, LANES, scalar
from .rows_source import MATH
from .unit import Function

CHUNK = 512  # tokens of a unit of work: 64 kB of 4-bit keys and values of 128 channels
SCRATCH = 1 << 22  # floats that a step over many tokens may take, 16 MiB
PARTS = 8  # most parts of keys and values together


def function(site: Site) -> Function:
    """A site's kernel, whose words are the addresses of a `Buffers` and a `Call`.

    Raises NotImplementedError where an encoding cannot be printed.
    """
    kept = site.kept if site.tail is not None else 0
    tile, body = _body(site) if kept else (LANES, EMPTY_BODY)
    text = KERNEL.substitute(
        name="$name",
        heads=site.heads,
        groups=site.kv_heads,
        key_dim=site.key_dim,
        value_dim=site.value_dim,
        sink=site.sink,
        kept=kept,
        body=tile,
        chunk=CHUNK,
        pages=pages_a_chunk(site),
        queries=queries(site),
        window=site.window or 0,
        dense=CTYPES[site.dense],
        direct=str(_direct(site)).lower(),
        dense_keys=_lines(dense_row(site.dense, site.key_dim), 2),
        dense_values=_lines(dense_row(site.dense, site.value_dim), 2),
        body_scan=body,
    )
    return Function.of(f"attention.{site.heads}x{site.kv_heads}x{site.key_dim}", text, (MATH, HEADER))


def queries(site: Site) -> int:
    """New tokens that share a decoded tile: as many as keep 64 query rows in the first-level cache."""
    return max(1, min(16, 64 // site.group))


def pages_a_chunk(site: Site) -> int:
    """Pages of the body that make a unit of work."""
    return max(1, CHUNK // max(site.kept, 1))


def scratch(site: Site, rows: int, slots: int, width: int, tokens: int) -> tuple[int, int]:
    """Floats of `Call.work`, and the blocks of queries that they serve at once.

    For a step of `tokens` new tokens on a batch whose rows have `slots` pages of body and `width` slots of tail.
    """
    chunks = -(-slots // pages_a_chunk(site)) - (-width // CHUNK)
    padded = -(-site.value_dim // LANES) * LANES
    block = rows * chunks * site.heads * queries(site) * (padded + 2)
    blocks = max(1, min(-(-tokens // queries(site)), SCRATCH // block))
    return blocks * block, blocks


def parts(site: Site) -> list[tuple[str, str, torch.Tensor]]:
    """(role, part, an encoded page [1, …]) in the order of `Buffers.parts`."""
    roles = (("keys", site.key_encoding, site.key_dim), ("values", site.value_encoding, site.value_dim))
    pages = [(role, encoding.encode(torch.zeros(1, site.kept, dim))) for role, encoding, dim in roles]
    return [(role, part, page) for role, encoded in pages for part, page in encoded.items()]


def _direct(site: Site) -> bool:
    """Whether dense rows are whole float32 vectors, which need no conversion."""
    return site.dense == "float32" and site.key_dim % LANES == 0 and site.value_dim % LANES == 0


def _lines(lines: list[str], indent: int) -> str:
    return "\n".join(" " * indent + line for line in lines)


def _body(site: Site) -> tuple[int, str]:
    """Tokens of a tile, and the scan over pages."""
    body, pages = Body.of(site), parts(site)
    if len(pages) > PARTS:
        raise NotImplementedError(f"{len(pages)} parts of keys and values; the kernel takes {PARTS}")
    names: dict[str, dict[str, str]] = {"keys": {}, "values": {}}
    pointers = []
    for slot, (role, part, page) in enumerate(pages):
        kind, name = CTYPES.get(str(page.dtype).removeprefix("torch.")), f"{role}_{part}"
        if kind is None:
            raise NotImplementedError(f"{role}: the part '{part}' is {page.dtype}, which the kernel cannot read")
        pointers.append(f"const {kind}* {name} = (const {kind}*)at.parts[{slot}] + slice * {page.numel()};")
        names[role][part] = name
    decode = row(body.keys.factor, site.key_dim, "key", names["keys"])
    decode += row(body.values.factor, site.value_dim, "value", names["values"])
    for at, (scale, zero) in enumerate(zip(body.values.scale, body.values.zero, strict=True)):
        decode.append(f"a[{32 * at} + i] = {scalar(scale, names['values'])};")
        decode.append(f"z[{32 * at} + i] = {scalar(zero, names['values']) if zero is not None else '0'};")
    prepare = []
    if body.keys.scale:
        zero = body.keys.zero[0]
        prepare += row(body.keys.scale[0], site.key_dim, "key_scale", names["keys"])
        prepare += row(zero, site.key_dim, "key_zero", names["keys"]) if zero is not None else []
    text = BODY.substitute(
        pointers=_lines(pointers, 6),
        decode=_lines(decode, 10),
        prepare=_lines(prepare, 8),
        spans=len(body.values.scale),
        fold=int(bool(body.keys.scale)),
        zero=int(bool(body.keys.scale) and body.keys.zero[0] is not None),
    )
    return body.tile, text
