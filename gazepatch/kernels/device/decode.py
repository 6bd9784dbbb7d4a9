"""One query token per row over all other entries, the selected regions and the periphery. One launch.

A program holds the query heads that share a selection in the columns of its products, and reads a share of the tiles
that the three kinds of entries make. Each of its warps attends by itself to a part of every tile, with a softmax of its
own, so that none waits for another until all have read theirs; then these are put together. The last program of a
selection to finish combines what all of them found. Both go by log-sum-exps.

Where little is read, what takes long is not reading but one instruction after the other, in few warps: so the query and
the first region are asked for at once, no integers are divided, loops over text and periphery that have no tiles are
jumped over, and addresses of visual entries differ from tile to tile by one number where a tile is of one region.

Source: split-KV as in FlashDecoding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gazepatch.kernels.device.arrival import arrive
from gazepatch.kernels.device.combination import combine, together
from gazepatch.kernels.device.reading import read_others, read_periphery, read_runs, run_of
from gazepatch.kernels.device.scores import LOG2E, LOWEST, in_powers_of_two


# What differs from prompt to prompt, or step to step, is not specialised: compiling again would take seconds.
@triton.jit(
    do_not_specialize=[
        "others",
        "places",
        "longest",
        "windows",
        "stride_bias_batch",
        "stride_sink_batch",
        "stride_sink_head",
    ]
)
def decode_kernel(
    query,  # [B, H, D], last axis dense
    key,  # [B, H_kv, T, D], last axis dense, as are those of all that follow
    value,  # [B, H_kv, T, D_v]
    bias,  # [b, T] float32, with HAS_BIAS
    visual_key,  # [B, H_kv, N, D]
    visual_value,  # [B, H_kv, N, D_v]
    runs,  # [B, H_kv, g, S] int64: first slot, and in the upper half tokens
    logits,  # [B, H, R * C] float32, with periphery
    taken,  # [B, H_kv, g, R] int8, with periphery
    mean_values,  # [B, H_kv, R * C, D_v], with periphery
    sinks,  # [b, H], with HAS_SINKS
    partial,  # scratch [B * H_kv * g, splits, ROWS, D_v] float32
    max_and_sum,  # scratch [B * H_kv * g, splits, ROWS, 2] float32: maximum and sum
    arrived,  # [B * H_kv * g] int32, zeros before and after
    output,  # out [B, H, D_v]
    scale,
    softcap,
    others,
    places,
    longest,
    windows,
    stride_query_batch,
    stride_query_head,
    stride_key_batch,
    stride_key_head,
    stride_key_token,
    stride_value_batch,
    stride_value_head,
    stride_value_token,
    stride_bias_batch,
    stride_visual_key_batch,
    stride_visual_key_head,
    stride_visual_value_batch,
    stride_visual_value_head,
    stride_mean_batch,
    stride_mean_head,
    stride_sink_batch,
    stride_sink_head,
    SELECTIONS: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WINDOWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RUNS: tl.constexpr,
    PER_TILE: tl.constexpr,
    IN_PIECES: tl.constexpr,
    PERIPHERY: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    CAPPED: tl.constexpr,
    EARLY: tl.constexpr,
    WAITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    LOG2E: tl.constexpr = LOG2E,
    LOWEST: tl.constexpr = LOWEST,
):
    if EARLY:
        tl.extra.cuda.gdc_wait()
    split, splits = tl.program_id(0), tl.num_programs(0)
    # A selection is one of a (row, key head) pair.
    selection = tl.program_id(1)
    group = (tl.program_id(2) * tl.num_programs(1) + selection).to(tl.int64)
    batch, head = tl.program_id(2).to(tl.int64), (selection // SELECTIONS).to(tl.int64)
    rows, parts = tl.arange(0, BLOCK_M), tl.arange(0, PARTS)
    cells = parts[:, None] * (BLOCK_N // PARTS) + tl.arange(0, BLOCK_N // PARTS)[None, :]
    dims, value_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    heads = selection * ROWS + rows
    p_query = query + batch * stride_query_batch + heads[None, :] * stride_query_head + dims[:, None]
    q = tl.load(p_query, mask=(rows < ROWS)[None, :] & (dims < DIM)[:, None], other=0.0)

    # All tiles, one kind after the other, shared out as evenly as they can be.
    to_others = tl.cdiv(others, BLOCK_N)
    pieces = tl.cdiv(longest, BLOCK_N) if IN_PIECES else 1
    to_runs = to_others + (tl.cdiv(places, PER_TILE) * pieces if HAS_RUNS else 0)
    tiles = to_runs + (tl.cdiv(windows, BLOCK_N) if PERIPHERY else 0)
    begin, end = _share_of(tiles, split, splits)

    # The first regions are asked for before the query is waited for.
    begin_runs, end_runs = tl.maximum(begin, to_others) - to_others, tl.minimum(end, to_runs) - to_others
    place = _quotient(begin_runs, pieces) if IN_PIECES else begin_runs
    p_runs = runs + group * places
    run = run_of(p_runs, place, cells, places, PER_TILE, BLOCK_N) if HAS_RUNS else 0
    scale, softcap = in_powers_of_two(scale, softcap, CAPPED)
    row_max = tl.full([PARTS, BLOCK_M], LOWEST, tl.float32)
    row_sum = tl.zeros([PARTS, BLOCK_M], tl.float32)
    acc = tl.zeros([PARTS, BLOCK_V, BLOCK_M], tl.float32)
    if HAS_SINKS:  # keys whose value is zero, of the first warp of the first program
        sink = tl.load(sinks + batch * stride_sink_batch + heads * stride_sink_head, mask=rows < ROWS, other=0.0)
        alone = (split + parts == 0)[:, None]
        row_max = tl.where(alone, sink.to(tl.float32)[None, :] * LOG2E, row_max)
        row_sum = tl.where(alone, 1.0, row_sum)
    q = tl.broadcast_to(q[None, :, :], [PARTS, BLOCK_D, BLOCK_M])

    # Most programs have tiles of one kind, and what a loop does before it begins is long.
    if begin < to_others:
        row_max, row_sum, acc = read_others(
            q,
            row_max,
            row_sum,
            acc,
            key + batch * stride_key_batch + head * stride_key_head,
            value + batch * stride_value_batch + head * stride_value_head,
            bias + batch * stride_bias_batch if HAS_BIAS else 0,
            stride_key_token,
            stride_value_token,
            begin,
            tl.minimum(end, to_others),
            others,
            cells,
            scale,
            softcap,
            DIM,
            VALUE_DIM,
            HAS_BIAS,
            CAPPED,
            BLOCK_N,
            BLOCK_D,
            BLOCK_V,
            PARTS,
            PRECISION,
        )
    if HAS_RUNS:
        row_max, row_sum, acc = read_runs(
            q,
            row_max,
            row_sum,
            acc,
            visual_key + batch * stride_visual_key_batch + head * stride_visual_key_head,
            visual_value + batch * stride_visual_value_batch + head * stride_visual_value_head,
            run,
            place,
            p_runs,
            begin_runs,
            end_runs,
            places,
            pieces,
            cells,
            scale,
            softcap,
            DIM,
            VALUE_DIM,
            CAPPED,
            PER_TILE,
            IN_PIECES,
            BLOCK_N,
            BLOCK_D,
            BLOCK_V,
            PARTS,
            PRECISION,
        )
    if PERIPHERY:
        # These two before the condition: inside, heads of 256 spill registers (Triton 3.9).
        p_means = mean_values + batch * stride_mean_batch + head * stride_mean_head + value_dims[None, :, None]
        p_logits = logits + ((group * ROWS + rows) * windows)[None, None, :]
        if end > to_runs:
            row_max, row_sum, acc = read_periphery(
                row_max,
                row_sum,
                acc,
                p_means,
                p_logits,
                taken + group * (windows // WINDOWS),
                tl.maximum(begin, to_runs),
                end,
                to_runs,
                windows,
                cells,
                ROWS,
                VALUE_DIM,
                WINDOWS,
                BLOCK_M,
                BLOCK_N,
                BLOCK_V,
                PARTS,
                PRECISION,
            )

    p_output = output + group * (ROWS * VALUE_DIM)
    o_row = rows[None, :] * VALUE_DIM + value_dims[:, None]
    inside = (rows < ROWS)[None, :] & (value_dims < VALUE_DIM)[:, None]
    # In each of the branches: they store in different layouts, and one result for both would be brought into both.
    if splits == 1:
        _, total, found = together(row_max, row_sum, acc, PARTS)
        tl.store(p_output + o_row, (found / total[None, :]).to(output.dtype.element_ty), mask=inside)
    else:
        largest, total, found = together(row_max, row_sum, acc, PARTS)
        p_max_and_sum = max_and_sum + group * splits * (ROWS * 2)
        p_partial = partial + group * splits * (ROWS * VALUE_DIM)
        o_max_and_sum = split * (ROWS * 2) + rows[:, None] * 2 + tl.arange(0, 2)[None, :]
        tl.store(p_max_and_sum + o_max_and_sum, tl.join(largest, total), mask=(rows < ROWS)[:, None])
        tl.store(p_partial + split * (ROWS * VALUE_DIM) + o_row, found, mask=inside)
        if arrive(arrived + group, WAITS) == splits - 1:
            tl.store(arrived + group, 0)
            combine(p_partial, p_max_and_sum, splits, p_output, ROWS, VALUE_DIM, BLOCK_G, BLOCK_V, BLOCK_S)


@triton.jit
def _share_of(tiles, split, splits):
    """The tiles that a program reads, from one up to another."""
    each = _quotient(tiles, splits)
    more = tiles - each * splits
    begin = split * each + tl.minimum(split, more)
    return begin, begin + each + (split < more).to(tl.int32)


@triton.jit
def _quotient(x, y):
    """`x // y` of numbers below 2 ** 22, by floats, which are off by one at most: integers take thirty instructions."""
    guess = (x.to(tl.float32) / y.to(tl.float32)).to(tl.int32)
    rest = x - guess * y
    return guess + (rest >= y).to(tl.int32) - (rest < 0).to(tl.int32)
