"""The Triton text of attention over segments; `attention_triton_source.py` fills in a site's shapes and loaders.

A unit of work is M query rows m = (new token, head of the group) of one (row, KV head), over all tiles of tokens that
this KV head of the row stores; heads may store different numbers. The tiles of all units lie end to end, and every
program of a fixed grid takes an equal stretch of them (Lean Attention: Hardware-Aware Scalable Attention Mechanism for
the Decode-Phase of Transformers, 2024, arXiv 2405.10480). A unit inside a stretch is finished at once. One that is cut
leaves a weighted value, a maximum and a sum for each piece, and `merge` joins the pieces in their order. Where the cuts
fall follows from the numbers of pages on the device. Sums are float32; products of rows and tiles take operands of the
site's dense type (float32: without TF32).
"""

from __future__ import annotations

from string import Template

KERNEL = Template('''\
"""Attention over the segments of $site"""

import triton
import triton.language as tl

$dense_keys
@triton.jit
def value_rows(x, n, live):
    k = tl.arange(0, $value_pad)[None, :]
    return $dense_value


@triton.jit
def score($queries, $keys, live, softcap, SOFTCAP: tl.constexpr):
$products
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

$loaders
@triton.jit
def tiles_of($sizes, pair, here, T):
    """Tiles of one or more KV heads in sink, bodies and tail, and how many the window skips in front of the tail's."""
    counts += 4 * (pair // $groups)
    n_sink = tl.load(counts, mask=here, other=0)
    n_tail, length = tl.load(counts + 2, mask=here, other=0), tl.load(counts + 3, mask=here, other=0)
    sink, skipped = (n_sink + $tile - 1) // $tile, n_tail * 0
    if $window:  # new tokens stand at the row's length or behind it
        last = n_sink - 1$sink_first
        sink = tl.where(length - last < $window, sink, 0)
        skipped = tl.maximum(n_tail - $window + 1, 0) // $tile
$body_tiles
    return sink, $bodies(n_tail + T + $tile - 1) // $tile - skipped, skipped


@triton.jit
def laid($sizes, B, T, blocks, PAIRS: tl.constexpr):
    """Numbers of (row, KV head) pairs, and the tiles that all units of each have together."""
    pairs = tl.arange(0, PAIRS)
    here = pairs < B * $groups
    sink, ${bodies}tail, skipped = tiles_of($sizes, pairs, here, T)
    return pairs, tl.where(here, sink + $body_sum + tail, 0).to(tl.int64) * blocks


@triton.jit
def attend(
    $parameters,
    SOFTCAP: tl.constexpr, SINKS: tl.constexpr, PAIRS: tl.constexpr, M: tl.constexpr,
):
    blocks = (T * $group + M - 1) // M
    pairs, each = laid($sizes, B, T, blocks, PAIRS)
    upto, all_tiles = tl.cumsum(each, 0), tl.sum(each, 0)
    programs, program = tl.minimum(tl.num_programs(0), all_tiles), tl.program_id(0).to(tl.int64)
    i = tl.minimum(program, programs) * all_tiles // programs
    end = tl.minimum(program + 1, programs) * all_tiles // programs
    while i < end:
        pair = tl.sum((upto <= i).to(tl.int32), 0).to(tl.int64)
        b, g = pair // $groups, (pair % $groups).to(tl.int32)
        n_sink_tiles, ${bodies}n_tail_tiles, skipped = tiles_of($sizes, pair, b < B, T)
        many = n_sink_tiles + $body_sum + n_tail_tiles
        inside_pair = i - tl.sum(tl.where(pairs < pair, each, 0), 0)
        block = (inside_pair // many).to(tl.int32)
        low = (inside_pair % many).to(tl.int32)
        high = tl.minimum(low + end - i, many).to(tl.int32)
        m = block * M + tl.arange(0, M)
        t, head = (m // $group).to(tl.int64), g * $group + m % $group
        inside = t < T
        words = (T + 63) // 64
        own = tl.load(visible + (b * T + t) * words + t // 64, mask=inside, other=0)
        real = ((own >> (t % 64)) & 1) != 0
        at = tl.load(positions + b * T + t, mask=inside, other=0)
        heads = b * q_row + head * q_head + t * q_token
$query
        zeros = tl.zeros((M,), tl.float32)
        most, total, acc = zeros + float("-inf"), zeros, tl.zeros((M, $value_pad), tl.float32)
        n_tail, length = tl.load(counts + 4 * b + 2), tl.load(counts + 4 * b + 3)
        before = n_sink_tiles
$sink_scan
$body_scans
        before -= skipped
        row = tl.arange(0, $tile)
        whole = n_tail // $tile  # tiles of stored tokens alone: no bitset to read
        for tile in range(tl.maximum(low - before, skipped), tl.minimum(high - before, whole)):
            live = real[:, None] & (row >= 0)[None, :]
            if $window:
                live = live & (at[:, None] - (length - n_tail + tile * $tile + row)[None, :] < $window)
            first, n = pair * W + tile * $tile, row[:, None]
$whole_keys
            p, most, total, acc = weigh(score($queries, $keys, live, softcap, SOFTCAP), most, total, acc)
            acc += mix(p, value_rows(tail_v + first * $value_dim, n, n >= 0))
        for tile in range(tl.maximum(low - before, tl.maximum(skipped, whole)), high - before):
            slot = tile * $tile + row
            new = slot - n_tail
            fresh = (new >= 0) & (new < T)
            itself = tl.load(visible + (b * T + new) * words + new // 64, mask=fresh, other=0)
            holds = (slot < n_tail) | (fresh & (((itself >> (new % 64)) & 1) != 0))  # padding may hold anything
            seen = tl.load(
                visible + (b * T + t[:, None]) * words + new[None, :] // 64,
                mask=inside[:, None] & fresh[None, :], other=0,
            )
            live = real[:, None] & ((slot < n_tail)[None, :] | (((seen >> (new[None, :] % 64)) & 1) != 0))
            live = live & holds[None, :]
            if $window:
                place = tl.load(positions + b * T + new, mask=fresh, other=0)
                place = tl.where(fresh, place, (length - n_tail + slot).to(tl.int64))
                live = live & (at[:, None] - place[None, :] < $window)
            first, n = pair * W + tile * $tile, row[:, None]
$new_keys
            p, most, total, acc = weigh(score($queries, $keys, live, softcap, SOFTCAP), most, total, acc)
            acc += mix(p, value_rows(tail_v + first * $value_dim, n, holds[:, None]))

        e = tl.arange(0, $value_pad)[None, :]
        if high - low == many:
            seen_any, peak = most > float("-inf"), most
            if SINKS:
                sink = tl.load(sinks + head)
                peak = tl.maximum(most, sink)
                total = total * tl.exp(most - peak) + tl.exp(sink - peak)
                acc = acc * tl.exp(most - peak)[:, None]
            value = tl.where(seen_any[:, None], acc / tl.where(seen_any, total, 1.0)[:, None], 0.0)
            to = b * out_row + head * out_head + t * out_token
            tl.store(out + to[:, None] + e, value, mask=inside[:, None] & (e < $value_dim))
        else:  # a program begins at most one unit that others finish, and ends at most one that others began
            piece = (2 * program + (low == 0).to(tl.int64)) * M + tl.arange(0, M)
            tl.store(work + piece[:, None] * $value_dim + e, acc, mask=inside[:, None] & (e < $value_dim))
            tl.store(stats + piece * 2, most, mask=inside)
            tl.store(stats + piece * 2 + 1, total, mask=inside)
        i += high - low


@triton.jit
def merge(
    $merged,
    SINKS: tl.constexpr, PAIRS: tl.constexpr, M: tl.constexpr,
):
    """One output row from the pieces of its unit, if the unit was cut; P programs computed them."""
    row = tl.program_id(0).to(tl.int64)
    b, h, t = row // ($heads * T), row // T % $heads, row % T
    pair, m = b * $groups + h // $group, t * $group + h % $group
    blocks = (T * $group + M - 1) // M
    pairs, each = laid($sizes, B, T, blocks, PAIRS)
    all_tiles = tl.sum(each, 0)
    programs = tl.minimum(P, all_tiles)
    many = tl.sum(tl.where(pairs == pair, each, 0), 0) // blocks
    start = tl.sum(tl.where(pairs < pair, each, 0), 0) + m // M * many
    # program p computes the tiles from p * all // programs on
    first = ((start + 1) * programs - 1) // all_tiles
    last = ((start + many) * programs - 1) // all_tiles
    if first < last:
        e = tl.arange(0, $value_pad)
        most, total, acc = float("-inf"), 0.0, tl.zeros(($value_pad,), tl.float32)
        for some in range(first, last + 1, $pieces):
            p = some + tl.arange(0, $pieces)
            here = p <= last
            piece = (2 * p + (p == first).to(tl.int64)) * M + m % M
            mosts = tl.load(stats + piece * 2, mask=here, other=float("-inf"))
            totals = tl.load(stats + piece * 2 + 1, mask=here, other=0)
            values = tl.load(
                work + piece[:, None] * $value_dim + e[None, :], mask=here[:, None] & (e < $value_dim)[None, :], other=0
            )
            peak = tl.maximum(most, tl.max(mosts, 0))
            safe = tl.where(peak == float("-inf"), 0.0, peak)
            shares, shrink = tl.exp(mosts - safe), tl.exp(most - safe)
            total = total * shrink + tl.sum(shares * totals, 0)
            acc = acc * shrink + tl.sum(shares[:, None] * values, 0)
            most = peak
        real = most > float("-inf")
        if SINKS:
            sink = tl.load(sinks + h)
            peak = tl.maximum(most, sink)
            total = total * tl.exp(most - peak) + tl.exp(sink - peak)
            acc = acc * tl.exp(most - peak)
        value = tl.where(real, acc / tl.where(real, total, 1.0), 0.0)
        tl.store(out + b * out_row + h * out_head + t * out_token + e, value, mask=e < $value_dim)
''')

KEY_ROWS = Template("""
@triton.jit
def key_rows_$piece(x, n, live):
    k = tl.arange(0, $pad)[None, :]
    return $value

""")

ANGLES = Template('''
@triton.jit
def angles(turns, place, live):
    """Cosines and sines of positions, one for each of the pairs of columns that turn."""
    k = tl.arange(0, $turn_pad)[None, :]
    live = live & (k < $turn)
    at = turns + place * ${turn_step} + k
    return tl.load(at, mask=live, other=0), tl.load(at + $turn, mask=live, other=0)

''')

SINK_SCAN = Template("""\
        n_sink = tl.load(counts + 4 * b)
        for tile in tl.range(low, tl.minimum(high, n_sink_tiles), num_stages=1):
            token = tile * $tile + tl.arange(0, $tile)
            live = real[:, None] & (token < n_sink)[None, :]
$first
            if $window:
                live = live & (at[:, None] - (base + tl.arange(0, $tile))[None, :] < $window)
            n = token[:, None]
$keys_here
            p, most, total, acc = weigh(score($queries, $keys, live, softcap, SOFTCAP), most, total, acc)
            acc += mix(p, value_rows(sink_v + pair * $sink * $value_dim, n, n < n_sink))
""")
