"""The logits of every token of a cache body on a GPU, in Triton, for heads to vote by; see `attention_triton_lists.py`.

A program computes one page of a (row, KV head) for M rows m = (new token, head of the group), with the loaders and the
arithmetic of attention. Pages that are not held are left as they were.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from string import Template
from typing import Any

import torch

from ..ir.cache import Site
from ..ir.cache.body import Body
from .attention_triton import held, options
from .attention_triton_bodies import SPUN
from .attention_triton_pieces import Pieces, angles, lined, neighbours, products, query
from .attention_triton_source import ROWS, scans
from .triton_module import load

KERNEL = Template('''\
"""Logits of the tokens of the body of $site"""

import triton
import triton.language as tl

$loaders

@triton.jit
def logits(
    q, out, $parameters, turns, held0, q_row, q_head, q_token, T, scale, softcap,
    SOFTCAP: tl.constexpr, M: tl.constexpr,
):
    page, pair, block = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    if page < tl.load(held0 + pair):
        b, g = pair // $groups, (pair % $groups).to(tl.int32)
        m = block * M + tl.arange(0, M)
        t, head = (m // $group).to(tl.int64), g * $group + m % $group
        inside = t < T
        heads = b * q_row + head * q_head + t * q_token
$query
        slot = tl.load(table0 + pair * P0 + page).to(tl.int64)
        to = out + (((b * $heads + head) * T + t) * P0 + page) * $cap
        for j in range($tiles):
            token = j * $tile + tl.arange(0, $tile)
$keys
            if SOFTCAP:
                s = softcap * (2 * tl.sigmoid(2 * s / softcap) - 1)
            tl.store(to[:, None] + token[None, :], s, mask=inside[:, None] & (token < $cap)[None, :])
''')


def source(site: Site) -> str:
    """The kernel `logits` of a site with one body as a Python module."""
    (scan,), pieces = scans(site), Pieces.of(site)
    turned, lines = scan.form.turned, []
    if turned:
        lines = [f"base = tl.load(pages0 + 2 * slot + 1) + j * {scan.tile}"]
        lines += neighbours(f"{scan.form.cap} - j * {scan.tile}", scan.tile)
    keys = [*lines, *scan.page_keys(0, turned).splitlines(), *products(site, pieces)]
    return KERNEL.substitute(
        site=site,
        loaders=(angles(pieces) if turned else "") + (SPUN if any(scan.form.spins) else "") + scan.loaders(),
        parameters=", ".join(scan.parameters),
        heads=site.heads,
        groups=site.kv_heads,
        group=site.group,
        cap=scan.form.cap,
        tile=scan.tile,
        tiles=scan.tiles,
        query=lined(scan.spun_query if scan.form.spins[0] else query(pieces), 8),
        keys=lined(keys, 12),
    )


def signature(site: Site) -> dict[str, str]:
    """Triton's type of every argument, for compiling ahead of time."""
    (scan,) = scans(site)
    turns = "*fp32" if scan.form.turned else "constexpr"
    strides = dict.fromkeys(("q_row", "q_head", "q_token", "T"), "i32")
    return {
        **{"q": "*fp32", "out": "*fp32"}, **scan.parameters, **{"turns": turns, "held0": "*i32"}, **strides,
        **{"scale": "fp32", "softcap": "fp32", "SOFTCAP": "constexpr", "M": "constexpr"},
    }  # fmt: skip


@cache
def kernel(site: Site) -> Any:
    """The kernel of a site; layers whose sites are alike share it."""
    return load(source(site), "logits").logits


def logits(
    site: Site, body: Body, turns: torch.Tensor | None, q: torch.Tensor, scale: float, softcap: float | None
) -> torch.Tensor:
    """scale · q k of q float32 [B, H, T, D], contiguous in D, for a body's tokens, float32 [B, H, T, P · cap].

    Places of pages that are not held hold anything. `turns`: of keys that turn by their positions when they are read.
    """
    (scan,), (rows, _, new, _) = scans(site), q.shape
    columns = body.table.shape[2]
    out = q.new_empty(rows, site.heads, new, columns * body.cap)
    grid = columns, rows * site.kv_heads, -(-new * site.group // ROWS)
    given = {name: value for name, value in held(body, scan).items() if name in scan.parameters}
    kernel(replace(site, layer=0))[grid](
        q, out, **given, turns=turns if scan.form.turned else None, held0=body.held,
        q_row=q.stride(0), q_head=q.stride(1), q_token=q.stride(2), T=new, scale=scale, softcap=softcap or 0.0,
        SOFTCAP=softcap is not None, M=ROWS, **options(site),
    )  # fmt: skip
    return out
