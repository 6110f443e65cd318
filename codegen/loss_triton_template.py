"""The Triton text of the cut cross-entropy: log-sum-exp of blocks of logits, and gradients from blocks made again.

`forward` walks a span of the vocabulary for a block of tokens and leaves the maximum, the sum and the label's logit.
`backward_x` owns a block of tokens and walks the vocabulary, `backward_weight` owns a block of the vocabulary and walks
the tokens: each adds to rows that no other program touches, so that no lock is taken and every run gives the same bits.
Sums are float32; products take operands as they are stored (float32: without TF32).
"""

KERNELS = '''\
"""Cut cross-entropy: loss and gradients of a vocabulary head without its logits in memory."""

import triton
import triton.language as tl


@triton.jit
def rows_of(matrix, row, k, rows, K):
    """A tile [row, k] of a matrix of `rows` rows, zero outside."""
    inside = (row < rows)[:, None] & (k < K)[None, :]
    return tl.load(matrix + row.to(tl.int64)[:, None] * K + k[None, :], mask=inside, other=0)


@triton.jit
def logits_of(
    x, weight, bias, n, v, N, V, K, softcap, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    BN: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
):
    s = tl.zeros((BN, BV), tl.float32)
    for first in range(0, K, BK):
        k = first + tl.arange(0, BK)
        s = tl.dot(rows_of(x, n, k, N, K), tl.trans(rows_of(weight, v, k, V, K)), s, input_precision="ieee")
    if BIAS:
        s += tl.load(bias + v, mask=v < V, other=0).to(tl.float32)[None, :]
    if SOFTCAP:
        s = softcap * (2 * tl.sigmoid(2 * s / softcap) - 1)
    return s


@triton.jit
def forward(
    x, weight, labels, bias, most, total, picked, N, V, K, span, softcap, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    BN: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
):
    n, part = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1)
    label = tl.load(labels + n, mask=n < N, other=-1)
    peak, added = tl.zeros((BN,), tl.float32) + float("-inf"), tl.zeros((BN,), tl.float32)
    of_label = tl.zeros((BN,), tl.float32)
    for first in range(part * span, tl.minimum((part + 1) * span, V), BV):
        v = first + tl.arange(0, BV)
        s = logits_of(x, weight, bias, n, v, N, V, K, softcap, SOFTCAP, BIAS, BN, BV, BK)
        s = tl.where((v < V)[None, :], s, float("-inf"))
        higher = tl.maximum(peak, tl.max(s, 1))
        added = added * tl.exp(peak - higher) + tl.sum(tl.exp(s - higher[:, None]), 1)
        of_label += tl.sum(tl.where(v[None, :] == label[:, None], s, 0.0), 1)
        peak = higher
    at = part.to(tl.int64) * N + n
    tl.store(most + at, peak, mask=n < N)
    tl.store(total + at, added, mask=n < N)
    tl.store(picked + at, of_label, mask=n < N)


@triton.jit
def shares_of(
    x, weight, labels, bias, logsum, grad, n, v, N, V, K, softcap, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    BN: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
):
    """The gradient of a block of logits, and the largest entry of softmax - one-hot in it."""
    s = logits_of(x, weight, bias, n, v, N, V, K, softcap, SOFTCAP, BIAS, BN, BV, BK)
    whole = tl.load(logsum + n, mask=n < N, other=float("inf"))
    label = tl.load(labels + n, mask=n < N, other=-1)
    share = tl.where((v < V)[None, :], tl.exp(s - whole[:, None]), 0.0)
    share = tl.where(v[None, :] == label[:, None], share - 1.0, share)
    largest = tl.max(tl.max(tl.abs(share), 1), 0)
    share *= tl.load(grad + n, mask=n < N, other=0)[:, None]
    if SOFTCAP:
        share *= 1 - (s / softcap) * (s / softcap)
    return share, largest


@triton.jit
def add_product(out, row, a, b_matrix, b_row, rows, b_rows, K, BK: tl.constexpr):
    """out[row] += a @ b_matrix[b_row], a span of columns at a time."""
    for first in range(0, K, BK):
        k = first + tl.arange(0, BK)
        to = out + row.to(tl.int64)[:, None] * K + k[None, :]
        inside = (row < rows)[:, None] & (k < K)[None, :]
        more = tl.dot(a, rows_of(b_matrix, b_row, k, b_rows, K), input_precision="ieee")
        tl.store(to, tl.load(to, mask=inside, other=0) + more, mask=inside)
    tl.debug_barrier()  # the next block adds to what other threads of this one may have stored


@triton.jit
def backward_x(
    x, weight, labels, bias, logsum, grad, dx, N, V, K, softcap, least, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    BN: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
):
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    for first in range(0, V, BV):
        v = first + tl.arange(0, BV)
        share, largest = shares_of(
            x, weight, labels, bias, logsum, grad, n, v, N, V, K, softcap, SOFTCAP, BIAS, BN, BV, BK
        )
        if largest >= least:
            add_product(dx, n, share.to(x.dtype.element_ty), weight, v, N, V, K, BK)


@triton.jit
def backward_weight(
    x, weight, labels, bias, logsum, grad, dweight, dbias, N, V, K, softcap, least,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
):
    v = tl.program_id(0) * BV + tl.arange(0, BV)
    of_bias = tl.zeros((BV,), tl.float32)
    for first in range(0, N, BN):
        n = first + tl.arange(0, BN)
        share, largest = shares_of(
            x, weight, labels, bias, logsum, grad, n, v, N, V, K, softcap, SOFTCAP, BIAS, BN, BV, BK
        )
        of_bias += tl.sum(share, 0)
        if largest >= least:
            add_product(dweight, v, tl.trans(share.to(x.dtype.element_ty)), x, n, V, N, K, BK)
    if BIAS:
        tl.store(dbias + v, of_bias, mask=v < V)
'''
