"""Score the windows, agree among the heads of a group, take the best regions. One launch.

Every program scores some regions of one (row, key head) pair. The last of a pair to finish, found by counting arrivals,
has all scores and takes the best regions: no second launch, and no sorting. The count is set back, so that nothing has
to be cleared between launches.
"""

from __future__ import annotations

import triton
import triton.language as tl


# What differs from prompt to prompt is not specialised: compiling again would take longer than an answer.
@triton.jit(do_not_specialize=["regions", "places", "splits", "count_row", "table_row", "budget_row"])
def select_kernel(
    query,  # [B, H, D], last axis dense
    mean_keys,  # [B, H_kv, R * C, D], any strides
    log_counts,  # [b, R * C] float32
    start,  # [b, R] int32 first slot of a region
    length,  # [b, R] int32 its tokens
    budget,  # [b] int32 regions that a query of the row reads
    logits,  # out [B, H, R * C] float32, with periphery
    region_logits,  # out [B, H, R] float32
    runs,  # out [B, H_kv, g, S, 2] int32: start and length of the selected regions, by number; then zeros
    taken,  # out [B, H_kv, g, R] int8, with periphery
    total,  # [1] int64, the tokens selected are added to it
    arrived,  # [B * H_kv] int32, zeros before and after
    scale,
    key_heads,
    regions,
    places,
    splits,
    query_row,
    query_head,
    mean_row,
    mean_head,
    mean_window,
    mean_dim,
    count_row,
    table_row,
    budget_row,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WINDOWS: tl.constexpr,
    PER_HEAD: tl.constexpr,
    BY_MAX: tl.constexpr,
    PERIPHERY: tl.constexpr,
    COUNTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ALL: tl.constexpr,
):
    pair, split = tl.program_id(0), tl.program_id(1)
    batch, key_head = pair // key_heads, pair % key_heads
    first_head = pair * GROUP
    rows, dims, cells = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R * BLOCK_C)
    of_query = query + batch.to(tl.int64) * query_row + (key_head * GROUP + rows)[:, None] * query_head + dims[None, :]
    q = tl.load(of_query, mask=(rows < GROUP)[:, None] & (dims < DIM)[None, :], other=0.0)
    of_pair = mean_keys + batch.to(tl.int64) * mean_row + key_head.to(tl.int64) * mean_head
    for tile in range(split, tl.cdiv(regions, BLOCK_R), splits):
        region, column = tile * BLOCK_R + cells // BLOCK_C, cells % BLOCK_C
        there = (region < regions) & (column < WINDOWS)
        window = region * WINDOWS + column
        of_window = of_pair + window.to(tl.int64)[None, :] * mean_window + dims[:, None].to(tl.int64) * mean_dim
        mean = tl.load(of_window, mask=there[None, :] & (dims < DIM)[:, None], other=0.0)
        size = tl.load(log_counts + batch * count_row + window, mask=there, other=-1e30)
        x = tl.dot(q, mean, input_precision="ieee") * scale + size[None, :]
        if PERIPHERY:
            of_logits = logits + (first_head + rows).to(tl.int64)[:, None] * (regions * WINDOWS) + window[None, :]
            tl.store(of_logits, x, mask=(rows < GROUP)[:, None] & there[None, :])
        numbers = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        of_regions = region_logits + (first_head + rows).to(tl.int64)[:, None] * regions + numbers[None, :]
        inside = (rows < GROUP)[:, None] & (numbers < regions)[None, :]
        # Of each region by itself, so that equal regions weigh the same to the bit, wherever they are scored.
        tl.store(of_regions, _log_sum_exp(x, BLOCK_M, BLOCK_R, BLOCK_C) if BLOCK_C > 1 else x, mask=inside)
    tl.debug_barrier()  # all stores of this program come before its arrival
    if tl.atomic_add(arrived + pair, 1, sem="acq_rel") == splits - 1:
        tl.store(arrived + pair, 0)
        number = tl.arange(0, BLOCK_ALL)
        there = number < regions
        tokens = tl.load(length + batch * table_row + number, mask=there, other=0)
        first = tl.load(start + batch * table_row + number, mask=there, other=0)
        wanted = tl.load(budget + batch * budget_row)
        of_scores = region_logits + first_head.to(tl.int64) * regions
        if PER_HEAD:
            for head in range(GROUP):
                share = _share(of_scores + head * regions, number, there)
                group = first_head + head
                _take(
                    share, number, first, tokens, wanted, regions, places, group, runs, taken, total, PERIPHERY, COUNTS
                )
        else:
            score = _share(of_scores, number, there)
            for head in range(1, GROUP):
                share = _share(of_scores + head * regions, number, there)
                score = tl.maximum(score, share) if BY_MAX else score + share
            if not BY_MAX:
                score = score / GROUP
            _take(score, number, first, tokens, wanted, regions, places, pair, runs, taken, total, PERIPHERY, COUNTS)


@triton.jit
def _log_sum_exp(x, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Over the windows of every region.

    Padding and absent windows have logits so low that they add nothing."""
    by_region = tl.reshape(x, (BLOCK_M, BLOCK_R, BLOCK_C))
    top = tl.max(by_region, 2)
    return top + tl.log(tl.sum(tl.exp(by_region - top[:, :, None]), 2))


@triton.jit
def _share(of_scores, number, there):
    """Softmax over the regions of one head."""
    x = tl.load(of_scores + number, mask=there, other=-float("inf"), cache_modifier=".cg")
    weight = tl.exp(x - tl.max(x, 0))
    return weight / tl.sum(weight, 0)


@triton.jit
def _take(
    score,
    number,
    first,
    tokens,
    wanted,
    regions,
    places,
    group,
    runs,
    taken,
    total,
    PERIPHERY: tl.constexpr,
    COUNTS: tl.constexpr,
):
    """Store the `wanted` best regions; of equal ones those with the lower number, like `gazepatch.selection.select`.

    The bits of a positive float grow with its value: the wanted-th largest is found two bits at a time, by counting.
    """
    bits = tl.where(tokens > 0, score.to(tl.int32, bitcast=True), -1)
    threshold = wanted * 0
    for step in range(15):  # shares are below 2, so their bits below 1 << 30
        shift = 28 - 2 * step
        one = (bits >= threshold + (1 << shift)).to(tl.int64)
        two = (bits >= threshold + (2 << shift)).to(tl.int64)
        three = (bits >= threshold + (3 << shift)).to(tl.int64)
        counts = tl.sum(one + (two << 20) + (three << 40), 0)
        enough = ((counts & 0xFFFFF) >= wanted).to(tl.int32) + (((counts >> 20) & 0xFFFFF) >= wanted).to(tl.int32)
        enough += ((counts >> 40) >= wanted).to(tl.int32)
        threshold += enough << shift
    above, equal = bits > threshold, (bits == threshold).to(tl.int32)
    rest = wanted - tl.sum(above.to(tl.int32), 0)
    take = above | ((equal > 0) & (tl.cumsum(equal, 0) <= rest))
    place = tl.cumsum(take.to(tl.int32), 0) - 1
    of_group = runs + group.to(tl.int64) * places * 2
    tl.store(of_group + place * 2, first, mask=take)
    tl.store(of_group + place * 2 + 1, tokens, mask=take)
    unused = (number >= tl.sum(take.to(tl.int32), 0)) & (number < places)
    tl.store(of_group + number * 2, 0, mask=unused)
    tl.store(of_group + number * 2 + 1, 0, mask=unused)
    if PERIPHERY:
        tl.store(taken + group.to(tl.int64) * regions + number, take.to(tl.int8), mask=number < regions)
    if COUNTS:
        tl.atomic_add(total, tl.sum(tl.where(take, tokens, 0), 0).to(tl.int64))
