"""The Triton text of a product through `tl.dot`; `gemm_triton.py` fills in the loaders of a product's weights.

A program computes a tile of outputs [BLOCK_N, BLOCK_M], weights as the left operand: few rows of x then fill the short
side. Products take operands of x's type (float32: without TF32) and sum in float32.
A norm's sizes are computed by every program anew: where there are many blocks of outputs over many rows, `rms_norm` of
`rows_triton.py` before a plain product reads less.
"""

KERNEL = '''\
"""{product}: a product through tl.dot"""

import triton
import triton.language as tl


{finish}

@triton.jit
def gemm(
    {parts}, x, y{norm}, bias, residual, work, arrived, M, N, K, x_row, y_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr,
):{whole}
    block, part = tl.program_id(0), tl.program_id(1)
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first_m = block // (GROUP * blocks_n) * GROUP
    width = tl.minimum(blocks_m - first_m, GROUP)
    block_m = first_m + block % (GROUP * blocks_n) % width
    block_n = block % (GROUP * blocks_n) // width
    rows = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = (block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[None, :]
    inside = (rows[:, None] < N) & (m < M)
{square}
{zeros}
    steps = tl.cdiv(tl.cdiv(K, {period}) * {lanes}, BLOCK_C)
    share = tl.cdiv(steps, SPLITS)
    for step in range(part * share, tl.minimum((part + 1) * share, steps)):
{walk}
{body}
    if SPLITS > 1:
        at = m * N + rows[:, None]
        stride = tl.full((), {sums}, tl.int64) * M * N
{partial}
        tl.debug_barrier()  # every thread's partial sums stand before the arrival is counted
        if tl.atomic_add(arrived + block, 1, sem="acq_rel") == SPLITS - 1:
{joined}
            tl.store(arrived + block, 0)
    else:
{done}
'''

SQUARE = """\
    squares = tl.zeros((128, BLOCK_M), tl.float32)
    for step in range(0, K, 128):
        column = (step + tl.arange(0, 128))[:, None]
        v = tl.load(x + m * x_row + column, mask=(m < M) & (column < K), other=0).to(tl.float32)
        squares += v * v
    size = tl.rsqrt(tl.sum(squares, axis=0, keep_dims=True) / K + eps)"""
