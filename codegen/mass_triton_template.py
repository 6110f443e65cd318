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
def queries_of(q, i, r, g, d, n, q_head, q_token, R: tl.constexpr, D: tl.constexpr):
    rows = (g * R + r).to(tl.int64) * q_head + i.to(tl.int64) * q_token
    return tl.load(q + rows[:, None] + d[None, :], mask=((i < n) & (r < R))[:, None] & (d < D)[None, :], other=0)


@triton.jit
def keys_of(k, s, g, d, used, k_head, D: tl.constexpr):
    rows = g.to(tl.int64) * k_head + s.to(tl.int64) * D
    return tl.load(k + rows[:, None] + d[None, :], mask=(s < used)[:, None] & (d < D)[None, :], other=0)


@triton.jit
def pieces(
    q, k, i, r, g, s, n, used, q_head, q_token, k_head, R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    M: tl.constexpr, BS: tl.constexpr, PIECE: tl.constexpr,
):
    """Products [M, BS], a few columns at a time: without tensor cores operands stand in registers, and spill."""
    x = tl.zeros((M, BS), tl.float32)
    for first in tl.range(0, DP, PIECE, num_stages=1):
        d = first + tl.arange(0, PIECE)
        query = queries_of(q, i, r, g, d, n, q_head, q_token, R, D).to(tl.float32)
        keys = keys_of(k, s, g, d, used, k_head, D).to(tl.float32)
        x = tl.dot(query, tl.trans(keys), x, input_precision="ieee")
    return x


@triton.jit
def masked(
    x, q_at, k_at, visible, i, r, g, s, n, used, k_at_head, fresh, window, scale, softcap,
    R: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, VISIBLE: tl.constexpr,
):
    """Logits [M, BS] from products, -inf where a query does not see a key."""
    x = x * scale
    if SOFTCAP:
        x = softcap * (2 * tl.sigmoid(2 * x / softcap) - 1)
    at, here = tl.load(q_at + i, mask=i < n, other=0), s < used
    place = tl.load(k_at + g * k_at_head + s, mask=here, other=0)
    distance = at[:, None] - place[None, :]
    live = distance >= 0
    if VISIBLE:
        j = s - (used - fresh)
        own = here & (j >= 0)
        words = (fresh + 63) // 64
        held = ((i < n)[:, None]) & own[None, :]
        bits = tl.load(visible + i[:, None] * words + (j // 64)[None, :], mask=held, other=0)
        live = tl.where(own[None, :], ((bits >> (j % 64)[None, :]) & 1) != 0, live)
    if WINDOW:
        live = live & (distance < window)
    return tl.where(live & here[None, :] & ((i < n) & (r < R))[:, None], x, float("-inf"))


@triton.jit
def sums(
    q, k, q_at, k_at, visible, used_at, stats, n, width, q_head, q_token, k_head, k_at_head, fresh, window, span, scale,
    softcap, G: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
    BS: tl.constexpr, WHOLE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, VISIBLE: tl.constexpr,
    USED: tl.constexpr,
):
    blocks = (n * RP + M - 1) // M
    g, block, split = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.program_id(1)
    used = width
    if USED:
        used = tl.load(used_at).to(tl.int32)
    m = block * M + tl.arange(0, M)
    i, r = m // RP, m % RP
    if WHOLE:
        query = queries_of(q, i, r, g, tl.arange(0, DP), n, q_head, q_token, R, D)
    most, total = tl.zeros((M,), tl.float32) + float("-inf"), tl.zeros((M,), tl.float32)
    seen = tl.zeros((M,), tl.float32)
    for first in range(split * span, tl.minimum((split + 1) * span, used), BS):
        s = first + tl.arange(0, BS)
        if WHOLE:
            keys = keys_of(k, s, g, tl.arange(0, DP), used, k_head, D)
            x = tl.dot(query.to(keys.dtype), tl.trans(keys))
        else:
            x = pieces(q, k, i, r, g, s, n, used, q_head, q_token, k_head, R, D, DP, M, BS, 16)
        x = masked(
            x, q_at, k_at, visible, i, r, g, s, n, used, k_at_head, fresh, window, scale, softcap,
            R, SOFTCAP, WINDOW, VISIBLE,
        )
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
    q, k, q_at, k_at, visible, used_at, stats, sinks, out, n, width, q_head, q_token, k_head, k_at_head, fresh, window,
    scale, softcap, G: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    M: tl.constexpr, BS: tl.constexpr, WHOLE: tl.constexpr, SPLITS: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, VISIBLE: tl.constexpr, USED: tl.constexpr, SINKS: tl.constexpr, LENGTH: tl.constexpr,
    EACH: tl.constexpr,
):
    """EACH 0: out [H, width] sums over queries; 1, 2, 3: out [n, G, width] is the mean, largest or sum over heads."""
    g, s = tl.program_id(0), tl.program_id(1) * BS + tl.arange(0, BS)
    used = width
    if USED:
        used = tl.load(used_at).to(tl.int32)
    blocks = (n * RP + M - 1) // M
    low, high = 0, blocks
    if EACH:
        low = tl.program_id(2)
        high = low + 1
    acc = tl.zeros((RP, BS), tl.float32)
    if WHOLE:
        keys = keys_of(k, s, g, tl.arange(0, DP), used, k_head, D)
    for block in range(low, high):
        m = block * M + tl.arange(0, M)
        i, r = m // RP, m % RP
        if WHOLE:
            query = queries_of(q, i, r, g, tl.arange(0, DP), n, q_head, q_token, R, D)
            x = tl.dot(query.to(keys.dtype), tl.trans(keys))
        else:
            x = pieces(q, k, i, r, g, s, n, used, q_head, q_token, k_head, R, D, DP, M, BS, 16)
        x = masked(
            x, q_at, k_at, visible, i, r, g, s, n, used, k_at_head, fresh, window, scale, softcap,
            R, SOFTCAP, WINDOW, VISIBLE,
        )
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
        if EACH:
            if EACH == 2:
                mass = tl.max(p, 1)
            else:
                mass = tl.sum(p, 1)
            if EACH == 1:
                mass = mass / R
            at = block * (M // RP) + tl.arange(0, M // RP)
            to = out + (at * G + g).to(tl.int64)[:, None] * width + s[None, :]
            tl.store(to, mass, mask=(at < n)[:, None] & (s < used)[None, :])
        else:
            acc += tl.sum(p, 0)
    if EACH == 0:
        head = tl.arange(0, RP)
        to = out + (g * R + head).to(tl.int64)[:, None] * width + s[None, :]
        tl.store(to, acc, mask=(head < R)[:, None] & (s < used)[None, :])
'''
