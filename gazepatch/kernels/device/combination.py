"""What the warps of a program found, and the programs of a selection, put together by log-sum-exps.

Source: https://arxiv.org/abs/2310.01889.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gazepatch.kernels.device.scores import LOWEST


@triton.jit
def together(row_max, row_sum, acc, PARTS: tl.constexpr):
    """One softmax of the first axis."""
    new_max = tl.max(row_max, 0)
    share = tl.exp2(row_max - new_max[None, :])
    return new_max, tl.sum(row_sum * share, 0), _sum_of_parts(acc * share[:, None, :], PARTS)


@triton.jit
def _sum_of_parts(x, PARTS: tl.constexpr):
    """`tl.sum` over the first axis, whose parts are those of the warps.

    All parts of a number come to one thread, which adds them up: a reduction would shuffle them, and then go through
    shared memory once more.
    """
    x = tl.permute(x, (1, 2, 0))
    if PARTS == 1:
        total = tl.reshape(x, [x.shape[0], x.shape[1]])
    elif PARTS == 2:
        first, second = tl.split(x)
        total = first + second
    elif PARTS == 4:
        first, second = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], 2, 2]))
        one, two = tl.split(first)
        three, four = tl.split(second)
        total = (one + two) + (three + four)
    else:
        total = tl.sum(x, 2)
    return total


@triton.jit
def combine(
    p_partial,
    p_max_and_sum,
    splits,
    p_output,
    ROWS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_S: tl.constexpr,
    LOWEST: tl.constexpr = LOWEST,
):
    """Put together what the programs of a selection found, BLOCK_S of them at a time: one wait for all their loads."""
    rows, dims = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_V)
    inside = (rows < ROWS)[:, None] & (dims < VALUE_DIM)[None, :]
    o_row = rows[:, None] * VALUE_DIM + dims[None, :]
    row_max = tl.full([BLOCK_G], LOWEST, tl.float32)
    row_sum = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_V], tl.float32)
    for at in range(0, splits, BLOCK_S):
        split = at + tl.arange(0, BLOCK_S)
        p_split = p_max_and_sum + split[None, :] * (ROWS * 2) + rows[:, None] * 2
        known = (split < splits)[None, :] & (rows < ROWS)[:, None]
        maxima = tl.load(p_split, mask=known, other=LOWEST, cache_modifier=".cg")
        sums = tl.load(p_split + 1, mask=known, other=0.0, cache_modifier=".cg")
        p_found = p_partial + split[None, :, None] * (ROWS * VALUE_DIM) + o_row[:, None, :]
        among = (split < splits)[None, :, None] & inside[:, None, :]
        found = tl.load(p_found, mask=among, other=0.0, cache_modifier=".cg")
        new_max = tl.maximum(row_max, tl.max(maxima, 1))
        share, keep = tl.exp2(maxima - new_max[:, None]), tl.exp2(row_max - new_max)
        acc = acc * keep[:, None] + tl.sum(found * share[:, :, None], 1)
        row_sum = row_sum * keep + tl.sum(sums * share, 1)
        row_max = new_max
    result = acc / tl.where(rows < ROWS, row_sum, 1.0)[:, None]
    tl.store(p_output + o_row, result.to(p_output.dtype.element_ty), mask=inside)
