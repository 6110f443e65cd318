"""The Triton text of HyperAttention over a prompt in the tail of a cache site; `hyper_triton.py` binds it.

Meaning and order of parts: `ir/cache/hyper.py`; tables: `hyper_layout.py`. A program has ROWS queries of one head, of a
block by position (`exact`) or by bucket (`approximate`), and reads tiles of gathered keys. `out` holds the mixed values
so far and `state` their maximum and sum: a launch of a level continues what the launches before it left.
"""

from __future__ import annotations

from string import Template

KERNEL = Template('''\
"""HyperAttention over the prompt of $site"""

import triton
import triton.language as tl


@triton.jit
def scramble(x):
    x = (x ^ (x >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def drawn(word, counter):
    return scramble(word + (counter.to(tl.uint32) + 1) * tl.full((), 0x9E3779B9, tl.uint32))


@triton.jit
def see(query, keys, values, place, here, bias, limit, most, total, acc):
    """Maximum, sum and value after a tile of tokens at `place`, of which a query sees those in front of its limit."""
    k, e = tl.arange(0, $key_pad), tl.arange(0, $value_pad)
    at = place.to(tl.int64)
    key = tl.load(keys + at[:, None] * $key_dim + k[None, :], mask=here[:, None] & (k < $key_dim)[None, :], other=0)
    s = tl.dot(query, tl.trans(key.to(tl.$compute)), input_precision="ieee") + bias
    s = tl.where(here[None, :] & (place[None, :] < limit[:, None]), s, float("-inf"))
    peak = tl.maximum(most, tl.max(s, 1))
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    p, shrink = tl.exp(s - safe[:, None]), tl.exp(most - safe)
    value = tl.load(
        values + at[:, None] * $value_dim + e[None, :], mask=here[:, None] & (e < $value_dim)[None, :], other=0
    )
    mixed = tl.dot(p.to(tl.$compute), value.to(tl.$compute), input_precision="ieee")
    return peak, total * shrink + tl.sum(p, 1), acc * shrink[:, None] + mixed


@triton.jit
def asked(q, start, token, inside, q_token, scale):
    k = tl.arange(0, $key_pad)
    at = start + token.to(tl.int64)[:, None] * q_token + k[None, :]
    query = tl.load(q + at, mask=inside[:, None] & (k < $key_dim)[None, :], other=0).to(tl.float32) * scale
    return query.to(tl.$compute)  # once: held as float32 it would take twice the registers


@triton.jit
def leave(out, state, to, held, inside, most, total, acc):
    e = tl.arange(0, $value_pad)
    tl.store(out + to[:, None] + e[None, :], acc / total[:, None], mask=inside[:, None] & (e < $value_dim)[None, :])
    tl.store(state + held, most, mask=inside)
    tl.store(state + held + 1, total, mask=inside)


@triton.jit
def exact(
    q, out, keys, values, state, units, lengths,
    q_row, q_head, q_token, out_row, out_head, out_token, W, T, scale,
):
    unit, h = tl.program_id(0) // $pieces, tl.program_id(1)
    b, first = tl.load(units + 3 * unit).to(tl.int64), tl.load(units + 3 * unit + 1)
    start = tl.load(units + 3 * unit + 2)
    inner = tl.program_id(0) % $pieces * $rows
    length = tl.minimum(tl.load(lengths + b), start + $block)
    token = start + inner + tl.arange(0, $rows)
    inside = token < length
    query = asked(q, b * q_row + h * q_head, token, inside, q_token, scale)
    pair = (b * $groups + h // $group) * W
    keys, values = keys + pair * $key_dim, values + pair * $value_dim
    most = tl.full(($rows,), float("-inf"), tl.float32)
    total, acc = tl.zeros(($rows,), tl.float32), tl.zeros(($rows, $value_pad), tl.float32)
    n = tl.arange(0, $tile)
    for at in range(0, tl.minimum(first, $sink), $tile):
        most, total, acc = see(
            query, keys, values, at + n, at + n < tl.minimum(first, $sink), 0.0, token + 1, most, total, acc
        )
    for at in range(first, tl.minimum(start + inner + $rows, length), $tile):
        most, total, acc = see(query, keys, values, at + n, at + n < length, 0.0, token + 1, most, total, acc)
    row = token.to(tl.int64)
    held = ((b * $heads + h) * T + row) * 2
    leave(out, state, b * out_row + h * out_head + row * out_token, held, inside, most, total, acc)


@triton.jit
def approximate(
    q, out, keys, values, state, parts, orders, starts,
    q_row, q_head, q_token, out_row, out_head, out_token, W, T, B, key, scale,
):
    part, h = parts + tl.program_id(0) // $pieces * 7, tl.program_id(1)
    inner = tl.program_id(0) % $pieces * $rows
    b, first, middle, end = tl.load(part).to(tl.int64), tl.load(part + 1), tl.load(part + 2), tl.load(part + 3)
    level, block, blocks = tl.load(part + 4).to(tl.int64), tl.load(part + 5), tl.load(part + 6)
    many_queries, many_keys = end - middle, middle - first
    low = (block * many_queries + blocks - 1) // blocks + inner
    high = ((block + 1) * many_queries + blocks - 1) // blocks
    if low < high:
        sides = orders + (level * B + b) * ($heads + $groups) * T
        by_bucket = sides + ($heads + h // $group) * T + first
        rank = low + tl.arange(0, $rows)
        inside = rank < high
        token = tl.load(sides + h * T + middle + rank, mask=inside, other=0)
        limit = tl.load(starts + b * ((T + $block - 1) // $block) + token // $block, mask=inside, other=0)
        query = asked(q, b * q_row + h * q_head, token, inside, q_token, scale)
        row = token.to(tl.int64)
        held, to = ((b * $heads + h) * T + row) * 2, b * out_row + h * out_head + row * out_token
        most, total = tl.load(state + held, mask=inside, other=0), tl.load(state + held + 1, mask=inside, other=1)
        e = tl.arange(0, $value_pad)
        mixed = tl.load(out + to[:, None] + e[None, :], mask=inside[:, None] & (e < $value_dim)[None, :], other=0)
        acc = mixed * total[:, None]
        pair = (b * $groups + h // $group) * W
        keys, values = keys + pair * $key_dim, values + pair * $value_dim
        n = tl.arange(0, $tile)
        mine = block * $block
        upto = tl.minimum(mine + $block, many_keys)
        for at in range(mine, upto, $tile):
            here = at + n < upto
            place = tl.load(by_bucket + at + n, mask=here, other=0)
            most, total, acc = see(query, keys, values, place, here, 0.0, limit, most, total, acc)
        outside = many_keys - (upto - mine)
        drawing = tl.minimum(outside, $sample)
        bias = tl.log(tl.maximum(outside, 1).to(tl.float32) / tl.maximum(drawing, 1))
        word = drawn(drawn(scramble(key.to(tl.uint32)), tl.full((), 2, tl.int32)), h)
        word = drawn(drawn(word, middle), block)
        for at in range(0, drawing, $tile):
            here = at + n < drawing
            fraction = (drawn(word, at + n) >> 8).to(tl.int64)
            r = ((((at + n).to(tl.int64) << 24) + fraction) * outside // drawing) >> 24
            place = tl.load(by_bucket + tl.where(r < mine, r, r + (upto - mine)), mask=here, other=0)
            most, total, acc = see(query, keys, values, place, here, bias, limit, most, total, acc)
        leave(out, state, to, held, inside, most, total, acc)
''')
