"""The Triton text of attention over segments; `attention_triton.py` fills in a site's shapes and loaders.

A program computes the query rows m = (new token, head of the group) of one (row, KV head) over one chunk of tokens, and
leaves a weighted value, a maximum and a sum; `merge` joins the chunks. Sums are float32; products of rows and tiles
take operands of the site's dense type (float32: without TF32).
"""

from __future__ import annotations

from string import Template

KERNEL = Template('''\
"""Attention over the segments of $site"""

import triton
import triton.language as tl


@triton.jit
def key_rows(x, n, live):
    k = tl.arange(0, $key_pad)[None, :]
    return $dense_key


@triton.jit
def value_rows(x, n, live):
    k = tl.arange(0, $value_pad)[None, :]
    return $dense_value


@triton.jit
def score(query, shift, keys, live, softcap, SOFTCAP: tl.constexpr):
    s = tl.dot(query.to(tl.$compute), tl.trans(keys.to(tl.$compute)), input_precision="ieee") + shift[:, None]
    if SOFTCAP:
        s = softcap * (2 * tl.sigmoid(2 * s / softcap) - 1)
    return tl.where(live, s, float("-inf"))


@triton.jit
def weigh(s, most, total, acc):
    """The weights of a tile, and maximum, sum and value brought to the new maximum."""
    peak = tl.maximum(most, tl.max(s, 1))
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    p = tl.exp(s - safe[:, None])
    shrink = tl.exp(most - safe)
    return p, peak, total * shrink + tl.sum(p, 1), acc * shrink[:, None]


@triton.jit
def mix(p, values):
    return tl.dot(p.to(tl.$compute), values.to(tl.$compute), input_precision="ieee")

$body_loaders
@triton.jit
def attend(
    q, work, stats, sink_k, sink_v, tail_k, tail_v$parameters, places, counts, positions, visible,
    q_row, q_head, q_token, T, W, P, scale, softcap, SOFTCAP: tl.constexpr, M: tl.constexpr,
):
    pair, c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, g = pair // $groups, pair % $groups
    m = tl.program_id(2) * M + tl.arange(0, M)
    t = (m // $group).to(tl.int64)
    inside = t < T
    words = (T + 63) // 64
    own = tl.load(visible + (b * T + t) * words + t // 64, mask=inside, other=0)
    real = ((own >> (t % 64)) & 1) != 0
    at = tl.load(positions + b * T + t, mask=inside, other=0)
    k = tl.arange(0, $key_pad)[None, :]
    heads = b * q_row + (g * $group + m % $group) * q_head + t * q_token
    query = tl.load(q + heads[:, None] + k, mask=inside[:, None] & (k < $key_dim), other=0).to(tl.float32) * scale
    zeros = tl.zeros((M,), tl.float32)
    most, total, acc = zeros + float("-inf"), zeros, tl.zeros((M, $value_pad), tl.float32)
    n_sink, n_body = tl.load(counts + 4 * b), tl.load(counts + 4 * b + 1)
    n_tail, length = tl.load(counts + 4 * b + 2), tl.load(counts + 4 * b + 3)
$sink_scan
$body_scan
    low = (c - chunks) * $chunk
    high = tl.minimum(low + $chunk, n_tail + T)
    for first in range(tl.where(c < chunks, high, low), high, $tile):
        slot = first + tl.arange(0, $tile)
        new = (slot - n_tail).to(tl.int64)
        fresh = (new >= 0) & (new < T)
        itself = tl.load(visible + (b * T + new) * words + new // 64, mask=fresh, other=0)
        holds = (slot < n_tail) | (fresh & (((itself >> (new % 64)) & 1) != 0))  # padding may hold anything
        seen = tl.load(
            visible + (b * T + t[:, None]) * words + new[None, :] // 64, mask=inside[:, None] & fresh[None, :], other=0
        )
        live = real[:, None] & ((slot < n_tail)[None, :] | (((seen >> (new[None, :] % 64)) & 1) != 0))
        live = live & holds[None, :]
        if $window:
            place = tl.load(positions + b * T + new, mask=fresh, other=0)
            place = tl.where(fresh, place, (length - n_tail + slot).to(tl.int64))
            live = live & (at[:, None] - place[None, :] < $window)
        n = slot[:, None].to(tl.int64)
        keys = key_rows(tail_k + pair * W * $key_dim, n, holds[:, None])
        p, most, total, acc = weigh(score(query, zeros, keys, live, softcap, SOFTCAP), most, total, acc)
        acc += mix(p, value_rows(tail_v + pair * W * $value_dim, n, holds[:, None]))

    e = tl.arange(0, $value_pad)[None, :]
    slot = (pair * tl.num_programs(1) + c) * T * $group + m
    tl.store(work + slot[:, None] * $value_dim + e, acc, mask=inside[:, None] & (e < $value_dim))
    tl.store(stats + slot * 2, most, mask=inside)
    tl.store(stats + slot * 2 + 1, total, mask=inside)


@triton.jit
def merge(work, stats, sinks, out, out_row, out_head, out_token, T, chunks, SINKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    b, h, t = row // ($heads * T), row // T % $heads, row % T
    e = tl.arange(0, $value_pad)
    first = (b * $groups + h // $group) * chunks * T * $group + t * $group + h % $group
    most = tl.load(stats + first * 2)
    for c in range(1, chunks):
        most = tl.maximum(most, tl.load(stats + (first + c * T * $group) * 2))
    real = most > float("-inf")
    total = 0.0
    if SINKS:
        sink = tl.load(sinks + h)
        most = tl.maximum(most, sink)
        total += tl.exp(sink - most)
    most = tl.where(most == float("-inf"), 0.0, most)
    acc = tl.zeros(($value_pad,), tl.float32)
    for c in range(0, chunks):
        slot = first + c * T * $group
        share = tl.exp(tl.load(stats + slot * 2) - most)
        total += share * tl.load(stats + slot * 2 + 1)
        acc += share * tl.load(work + slot * $value_dim + e, mask=e < $value_dim, other=0)
    value = tl.where(real, acc / tl.where(real, total, 1.0), 0.0)
    tl.store(out + b * out_row + h * out_head + t * out_token + e, value, mask=e < $value_dim)
''')

SINK_SCAN = Template("""\
    for first in range(0, tl.where(c == 0, n_sink, 0), $tile):
        place = first + tl.arange(0, $tile)
        live = real[:, None] & (place < n_sink)[None, :]
        if $window:
            live = live & (at[:, None] - place[None, :] < $window)
        n = place[:, None].to(tl.int64)
        keys = key_rows(sink_k + pair * $sink * $key_dim, n, n < n_sink)
        p, most, total, acc = weigh(score(query, zeros, keys, live, softcap, SOFTCAP), most, total, acc)
        acc += mix(p, value_rows(sink_v + pair * $sink * $value_dim, n, n < n_sink))
""")

BODY_LOADERS = Template("""
@triton.jit
def page_keys($key_parts, j):
    k = tl.arange(0, $key_pad)[None, :]
    i = tl.arange(0, $body)[:, None].to(tl.int64)
    n = j * $body + i
    return $key


@triton.jit
def page_query(query, $key_parts, j):
    \"\"\"The query with what of the keys is constant over a tile, and what that adds to every score.\"\"\"
    k = tl.arange(0, $key_pad)[None, :]
    return query * $key_scale, tl.sum(query * $key_zero, 1)


@triton.jit
def page_values($value_parts, j):
    k = tl.arange(0, $value_pad)[None, :]
    n = j * $body + tl.arange(0, $body)[:, None].to(tl.int64)
    return $value

""")

BODY_SCAN = Template("""\
    chunks = (n_body // $kept + $pages - 1) // $pages
    for page in range(c * $pages, tl.minimum((c + 1) * $pages, n_body // $kept)):
        at_page = pair * P + page
        for j in range(0, $tiles):
            token = j * $body + tl.arange(0, $body)
            live = real[:, None] & (token < $kept)[None, :]
            if $window:
                place = tl.load(places + at_page * $kept + token, mask=token < $kept, other=0)
                live = live & (at[:, None] - place[None, :] < $window)
            scaled, shift = page_query(query, $keys_here, j)
            keys = page_keys($keys_here, j)
            p, most, total, acc = weigh(score(scaled, shift, keys, live, softcap, SOFTCAP), most, total, acc)
            acc += mix(p, page_values($values_here, j))
""")
