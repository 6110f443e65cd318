"""The Triton text of the scan over one body of a cache site; `attention_triton_source.py` fills in how pages are read.

Read are its pages as they lie, the pages that a query's list names, or the tokens of such a list.
A list belongs to one new token: its tiles are read for the rows of that token alone. A body whose rows were rotated
before they were encoded is read by rotated queries, and the value in its frame: it is rotated there before the scan, if
other tokens are in it already, and back behind it.
"""

from __future__ import annotations

from string import Template

KEYS = Template("""
@triton.jit
def page_keys${body}_$piece($parts, j):
$lines

""")

VALUES = Template("""
@triton.jit
def page_values$body($parts, j):
$lines

""")

TOKEN = Template("""
@triton.jit
def token_$role($parts, n):
    k = tl.arange(0, $pad)[None, :]
    return $value

""")

SPUN = """
@triton.jit
def spun(x, live, matrix, INVERSE: tl.constexpr, M: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr):
    # rows of float32 at x [M, 1] times a rotation [DIM, DIM], or times its inverse; tl.dot in float32 would spill
    e = tl.arange(0, PAD)[None, :]
    y = tl.zeros((M, PAD), tl.float32)
    for first in range(0, DIM, 4):
        for k in tl.static_range(4):  # eight spill on sm_90
            at = first + k + e * DIM if INVERSE else (first + k) * DIM + e
            y += tl.load(x + first + k, mask=live, other=0) * tl.load(matrix + at, mask=e < DIM, other=0)
    return y


@triton.jit
def spun_value(acc, own, live, matrix, INVERSE: tl.constexpr, M: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr):
    e = tl.arange(0, PAD)[None, :]
    tl.store(own + e, acc, mask=live & (e < DIM))  # to other threads, through the program's place in the scratch
    tl.debug_barrier()
    y = spun(own, live, matrix, INVERSE, M, DIM, PAD)
    tl.debug_barrier()
    return y

"""

SPUN_SCAN = Template("""\
        mine$body = tl.maximum(low - before, 0) < tl.minimum(high - before, n_body$body)
        own = work + ((2 * program + (low == 0).to(tl.int64)) * M + tl.arange(0, M))[:, None] * $value_dim
        if mine$body:
$into
$scan
        if mine$body:
$back
""")

WHOLE = Template("""\
        for tile in range(tl.maximum(low - before, 0), tl.minimum(high - before, n_body$body)):
            slot = tl.load(table$body + pair * P$body + tile // $tiles).to(tl.int64)
            j = tile % $tiles
            live = real[:, None]
$page
""")

# lists of a unit's new tokens lie end to end, each as long as a list may be; what one does not have is skipped
LISTED = Template("""\
        longest, t0 = $longest, block * M // $group
        for mine in range(
            tl.maximum(low - before, 0) // longest, (tl.minimum(high - before, n_body0) + longest - 1) // longest
        ):
            list_at = (b * T + t0 + mine) * $groups + g
            some = tl.load(picked + list_at, mask=t0 + mine < T, other=0)
            started = before + mine * longest
            for tile in range(tl.maximum(low - started, 0), tl.minimum(high - started, $some)):
$read
""")

PAGES = Template("""\
                entry = tl.load(picks + list_at * N + tile // $tiles)
                slot = tl.load(table0 + pair * P0 + entry).to(tl.int64)
                j = tile % $tiles
                live = (real & (t == t0 + mine))[:, None]
$page""")

TOKENS = Template("""\
                place = tile * $tile + tl.arange(0, $tile)
                entry = tl.load(picks + list_at * N + place, mask=place < some, other=0)
                slot = tl.load(table0 + pair * P0 + entry // $cap).to(tl.int64)
                n = entry % $cap
                live = (real & (t == t0 + mine))[:, None] & (place < some)[None, :]
$window
                here, n = slot[:, None], n[:, None]
$keys_here
                s = score($queries, $keys, live, softcap, SOFTCAP)$bias
                p, most, total, acc = weigh(s, most, total, acc)
                acc += mix(p, token_values($values_here, n))""")

PAGE = Template("""\
            token = j * $tile + tl.arange(0, $tile)
            fill = tl.load(pages$body + 2 * slot)
            live = live & (token < fill)[None, :]
$window
$keys_here
            s = score($queries, $keys, live, softcap, SOFTCAP)$bias
            p, most, total, acc = weigh(s, most, total, acc)
            acc += mix(p, page_values$body($values_here, j))""")
