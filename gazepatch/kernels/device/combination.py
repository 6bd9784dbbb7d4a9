"""What the warps of a program found, and the programs of a selection, put together by log-sum-exps.

Source: https://arxiv.org/abs/2310.01889.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gazepatch.kernels.device.scores import LOWEST


@triton.jit
def together(row_max, row_sum, acc, PARTS: tl.constexpr):
    """One softmax of the first axis, whose parts are those of the warps.

    All parts of a number come to one thread, sums and maxima too: reductions would shuffle them and go through shared
    memory twice, and sums would wait for maxima.
    """
    return _merged(tl.permute(row_max, (1, 0)), tl.permute(row_sum, (1, 0)), tl.permute(acc, (1, 2, 0)), PARTS)


@triton.jit
def _merged(row_max, row_sum, acc, PARTS: tl.constexpr):
    """One softmax of the last axis, by pairs."""
    if PARTS == 1:
        row_max, row_sum = tl.reshape(row_max, [row_max.shape[0]]), tl.reshape(row_sum, [row_sum.shape[0]])
        return row_max, row_sum, tl.reshape(acc, [acc.shape[0], acc.shape[1]])
    else:
        first_max, second_max = tl.split(tl.reshape(row_max, [row_max.shape[0], PARTS // 2, 2]))
        first_sum, second_sum = tl.split(tl.reshape(row_sum, [row_max.shape[0], PARTS // 2, 2]))
        first_acc, second_acc = tl.split(tl.reshape(acc, [acc.shape[0], acc.shape[1], PARTS // 2, 2]))
        new_max = tl.maximum(first_max, second_max)
        first_share, second_share = tl.exp2(first_max - new_max), tl.exp2(second_max - new_max)
        new_sum = first_sum * first_share + second_sum * second_share
        new_acc = first_acc * first_share[None, :, :] + second_acc * second_share[None, :, :]
        return _merged(new_max, new_sum, new_acc, PARTS // 2)


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
    """Put together what the programs of a selection found, BLOCK_S of them at a time: one wait for all their loads.

    Of axes with gaps Triton shares out the first among lanes, or else among warps. So splits come first where they fit
    into lanes, and after the rows where a thread adds them up: either way, no warp waits for another.
    """
    rows, dims, both, split = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_V), tl.arange(0, 2), tl.arange(0, BLOCK_S)
    inside = (rows < ROWS)[:, None] & (dims < VALUE_DIM)[None, :]
    o_row = rows[:, None] * VALUE_DIM + dims[None, :]
    p_max_and_sum += (split[:, None] * ROWS + rows[None, :])[:, :, None] * 2 + both[None, None, :]
    p_partial += o_row[:, None, :]
    row_max = tl.full([BLOCK_G], LOWEST, tl.float32)
    row_sum = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_V], tl.float32)
    for at in range(0, splits, BLOCK_S):
        there = at + split < splits
        known = there[:, None] & (rows < ROWS)[None, :]
        p_split = p_max_and_sum + at * (ROWS * 2)
        maxima, sums = tl.split(tl.load(p_split, mask=known[:, :, None], other=0.0, cache_modifier=".cg"))
        p_found = p_partial + at * (ROWS * VALUE_DIM) + split[None, :, None] * (ROWS * VALUE_DIM)
        found = tl.load(p_found, mask=there[None, :, None] & inside[:, None, :], other=0.0, cache_modifier=".cg")
        maxima = tl.where(known, maxima, LOWEST)
        new_max = tl.maximum(row_max, tl.max(maxima, 0))
        share, keep = tl.exp2(maxima - new_max[None, :]), tl.exp2(row_max - new_max)
        acc = acc * keep[:, None] + tl.sum(found * tl.trans(share)[:, :, None], 1)
        # A product alone would be fused with the first sum, in which the threads of a row would then differ.
        row_sum = row_sum * keep + tl.sum(tl.where(known, sums * share, 0.0), 0)
        row_max = new_max
    result = acc / tl.where(rows < ROWS, row_sum, 1.0)[:, None]
    tl.store(p_output + o_row, result.to(p_output.dtype.element_ty), mask=inside)
