"""The Triton text of attention mass, as `mass_template.py` defines it; `mass_triton.py` launches it.

`sums` leaves a maximum, a sum and a count of seen keys of each query row for each split of the keys, `columns` computes
the logits of a tile of keys again and adds up what they get, row block by row block in order: no atomics, and the same
bits in every run. A row is a query and a head of the group, heads padded to a power of two. Sums are float32; products
take operands of the keys' type (float32: without TF32).
"""

KERNELS = '''\
"""Attention mass over dense keys"""

import triton
import triton.language as tl


@triton.jit
def queries_of(q, i, r, g, d, n, q_head, R: tl.constexpr, D: tl.constexpr):
    rows = (g * R + r).to(tl.int64) * q_head + i.to(tl.int64) * D
    return tl.load(q + rows[:, None] + d[None, :], mask=((i < n) & (r < R))[:, None] & (d < D)[None, :], other=0)


@triton.jit
def keys_of(k, s, g, d, stored, k_head, D: tl.constexpr):
    rows = g.to(tl.int64) * k_head + s.to(tl.int64) * D
    return tl.load(k + rows[:, None] + d[None, :], mask=(s < stored)[:, None] & (d < D)[None, :], other=0)


@triton.jit
def pieces(
    q, k, i, r, g, s, n, stored, q_head, k_head, R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    M: tl.constexpr, BS: tl.constexpr, PIECE: tl.constexpr,
):
    """Products [M, BS], a few columns at a time: without tensor cores operands stand in registers, and spill."""
    x = tl.zeros((M, BS), tl.float32)
    for first in tl.range(0, DP, PIECE, num_stages=1):
        d = first + tl.arange(0, PIECE)
        query = queries_of(q, i, r, g, d, n, q_head, R, D).to(tl.float32)
        keys = keys_of(k, s, g, d, stored, k_head, D).to(tl.float32)
        x = tl.dot(query, tl.trans(keys), x, input_precision="ieee")
    return x


@triton.jit
def masked(
    x, q_at, k_at, i, r, g, s, n, stored, k_at_head, window, scale, softcap,
    R: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
):
    """Logits [M, BS] from products, -inf where a query does not see a key."""
    x = x * scale
    if SOFTCAP:
        x = softcap * (2 * tl.sigmoid(2 * x / softcap) - 1)
    at, here = tl.load(q_at + i, mask=i < n, other=0), s < stored
    place = tl.load(k_at + g * k_at_head + s, mask=here, other=0)
    distance = at[:, None] - place[None, :]
    live = distance >= 0
    if WINDOW:
        live = live & (distance < window)
    return tl.where(live & here[None, :] & ((i < n) & (r < R))[:, None], x, float("-inf"))


@triton.jit
def sums(
    q, k, q_at, k_at, stats, n, stored, q_head, k_head, k_at_head, window, span, scale,
    softcap, G: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
    BS: tl.constexpr, WHOLE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
):
    blocks = (n * RP + M - 1) // M
    g, block, split = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.program_id(1)
    m = block * M + tl.arange(0, M)
    i, r = m // RP, m % RP
    if WHOLE:
        query = queries_of(q, i, r, g, tl.arange(0, DP), n, q_head, R, D)
    most, total = tl.zeros((M,), tl.float32) + float("-inf"), tl.zeros((M,), tl.float32)
    seen = tl.zeros((M,), tl.float32)
    for first in range(split * span, tl.minimum((split + 1) * span, stored), BS):
        s = first + tl.arange(0, BS)
        if WHOLE:
            keys = keys_of(k, s, g, tl.arange(0, DP), stored, k_head, D)
            x = tl.dot(query.to(keys.dtype), tl.trans(keys))
        else:
            x = pieces(q, k, i, r, g, s, n, stored, q_head, k_head, R, D, DP, M, BS, 16)
        x = masked(x, q_at, k_at, i, r, g, s, n, stored, k_at_head, window, scale, softcap, R, SOFTCAP, WINDOW)
        peak = tl.maximum(most, tl.max(x, 1))
        safe = tl.where(peak == float("-inf"), 0.0, peak)
        total = total * tl.exp(most - safe) + tl.sum(tl.exp(x - safe[:, None]), 1)
        seen += tl.sum((x > float("-inf")).to(tl.float32), 1)
        most = peak
    to = stats + (((split * G + g) * blocks).to(tl.int64) * M + m) * 3
    tl.store(to, most)
    tl.store(to + 1, total)
    tl.store(to + 2, seen)


@triton.jit
def columns(
    q, k, q_at, k_at, stats, sinks, out, n, stored, q_head, k_head, k_at_head, window,
    scale, softcap, G: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    M: tl.constexpr, BS: tl.constexpr, WHOLE: tl.constexpr, SPLITS: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, LENGTH: tl.constexpr,
):
    g, s = tl.program_id(0), tl.program_id(1) * BS + tl.arange(0, BS)
    blocks = (n * RP + M - 1) // M
    acc = tl.zeros((RP, BS), tl.float32)
    if WHOLE:
        keys = keys_of(k, s, g, tl.arange(0, DP), stored, k_head, D)
    for block in range(blocks):
        m = block * M + tl.arange(0, M)
        i, r = m // RP, m % RP
        if WHOLE:
            query = queries_of(q, i, r, g, tl.arange(0, DP), n, q_head, R, D)
            x = tl.dot(query.to(keys.dtype), tl.trans(keys))
        else:
            x = pieces(q, k, i, r, g, s, n, stored, q_head, k_head, R, D, DP, M, BS, 16)
        x = masked(x, q_at, k_at, i, r, g, s, n, stored, k_at_head, window, scale, softcap, R, SOFTCAP, WINDOW)
        split = tl.arange(0, SPLITS)[:, None]
        of = stats + (((split * G + g) * blocks).to(tl.int64) * M + m[None, :]) * 3
        mosts = tl.load(of)
        most, seen = tl.max(mosts, 0), tl.sum(tl.load(of + 2), 0)
        if SINKS:
            sink = tl.load(sinks + g * R + r, mask=r < R, other=float("-inf"))
            most = tl.maximum(most, sink)
        safe = tl.where(most == float("-inf"), 0.0, most)
        total = tl.sum(tl.load(of + 1) * tl.exp(mosts - safe[None, :]), 0)
        if SINKS:
            total += tl.exp(sink - safe)
        factor = tl.where(seen > 0, 1.0 / tl.where(seen > 0, total, 1.0), 0.0)
        if LENGTH:
            factor *= seen
        p = tl.reshape(tl.exp(x - safe[:, None]) * factor[:, None], (M // RP, RP, BS))
        acc += tl.sum(p, 0)
    head = tl.arange(0, RP)
    to = out + (g * R + head).to(tl.int64)[:, None] * stored + s[None, :]
    tl.store(to, acc, mask=(head < R)[:, None] & (s < stored)[None, :])
'''
