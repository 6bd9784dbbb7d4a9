"""Score the windows, agree among the heads of a group, take the best regions. One launch.

Every program scores some regions of one (row, key head) pair. The last of a pair to finish, found by counting arrivals,
has all scores and takes the best regions: no second launch, and no sorting. The count is set back, so that nothing has
to be cleared between launches. By the way, one program of a pair appends the step's own entry to the others.

What the last program does is a chain of waits, not of work: it loads as many heads at a time as its registers hold, and
looks for the threshold only until nothing is left to decide.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gazepatch.kernels.device.arrival import arrive
from gazepatch.kernels.device.scores import LOG2E, LOWEST, scores_of
from gazepatch.regions import ABSENT  # the logit of a region that is not there, or less

#: Above the bits of every share, which is below 2.
TOP = 1 << 30


# What differs from prompt to prompt is not specialised: compiling again would take longer than an answer.
@triton.jit(
    do_not_specialize=[
        "offset",
        "regions",
        "places",
        "stride_count_batch",
        "stride_table_batch",
        "stride_budget_batch",
        "room",
    ]
)
def select_kernel(
    query,  # [B, H, D], last axis dense
    mean_keys,  # [B, H_kv, R * C, D], any strides
    log_counts,  # [b, R * C] float32
    table,  # [b, R] int64: first slot of a region, and in the upper half its tokens
    budget,  # [b] int32 regions that a query of the row reads
    logits,  # out [B, H, R * C] float32, with periphery
    region_logits,  # out [B, H, padded] float32: a multiple of 16, of which those past R weigh nothing
    runs,  # out [B, H_kv, g, S] int64, as in the table, of the selected regions by number; then zeros
    taken,  # out [B, H_kv, g, R] int8, with periphery
    total,  # [1] int64, the tokens selected are added to it
    arrived,  # [B * H_kv] int32, zeros before and after
    key,  # [B, H_kv, T, D] contiguous, as is the next; with APPENDS
    value,  # [B, H_kv, T, D_v], if there are values
    new_key,  # [B, H_kv, 1, D], last axis dense, as that of the next
    new_value,  # [B, H_kv, 1, D_v]
    filled,  # int64 number, or None
    offset,
    scale,
    softcap,
    regions,
    padded,
    places,
    stride_query_batch,
    stride_query_head,
    stride_mean_batch,
    stride_mean_head,
    stride_mean_window,
    stride_mean_dim,
    stride_count_batch,
    stride_table_batch,
    stride_budget_batch,
    room,
    stride_new_key_batch,
    stride_new_key_head,
    stride_new_value_batch,
    stride_new_value_head,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WINDOWS: tl.constexpr,
    PER_HEAD: tl.constexpr,
    BY_MAX: tl.constexpr,
    PERIPHERY: tl.constexpr,
    COUNTS: tl.constexpr,
    CAPPED: tl.constexpr,
    APPENDS: tl.constexpr,
    EARLY: tl.constexpr,
    WAITS: tl.constexpr,
    ONCE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_ALL: tl.constexpr,
    WAYS: tl.constexpr,
):
    split, key_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits, pair = tl.num_programs(0), batch * tl.num_programs(1) + key_head
    if CAPPED:
        scale = scale / softcap
    if APPENDS:  # asked for here and stored later: nothing waits for memory before it has asked for all it needs
        appends = (split == splits - 1).to(tl.int32)  # a program that has no more to score than others
        slot = _slot_to_fill(offset, filled)
        p_new = new_key + batch.to(tl.int64) * stride_new_key_batch + key_head * stride_new_key_head
        entry_key = _entry(p_new, appends, DIM, BLOCK_D)
        if VALUE_DIM > 0:
            p_new = new_value + batch.to(tl.int64) * stride_new_value_batch + key_head * stride_new_value_head
            entry_value = _entry(p_new, appends, VALUE_DIM, BLOCK_V)
    first_head = pair * GROUP
    _score_regions(
        query + batch.to(tl.int64) * stride_query_batch + key_head * GROUP * stride_query_head,
        mean_keys + batch.to(tl.int64) * stride_mean_batch + key_head.to(tl.int64) * stride_mean_head,
        log_counts + batch * stride_count_batch,
        logits,
        region_logits,
        first_head,
        split,
        splits,
        scale,
        softcap,
        regions,
        padded,
        stride_query_head,
        stride_mean_window,
        stride_mean_dim,
        GROUP,
        DIM,
        WINDOWS,
        PERIPHERY,
        CAPPED,
        ONCE,
        BLOCK_M,
        BLOCK_R,
        BLOCK_C,
        BLOCK_D,
    )
    if APPENDS:
        appends *= (slot < room).to(tl.int32)  # nothing past the end of a full store
        slot += pair.to(tl.int64) * room
        _append(key + slot * DIM, entry_key, appends, DIM, BLOCK_D)
        if VALUE_DIM > 0:
            _append(value + slot * VALUE_DIM, entry_value, appends, VALUE_DIM, BLOCK_V)
    if EARLY:  # not before, as programs that wait take the room of those that have something to do
        tl.extra.cuda.gdc_launch_dependents()
    before = splits - 1
    if splits > 1:
        before = arrive(arrived + pair, WAITS)
    else:
        tl.debug_barrier()
    if before == splits - 1:
        tl.store(arrived + pair, 0)
        # Every head for itself, or all of them together.
        SELECTIONS: tl.constexpr = GROUP if PER_HEAD else 1
        _take_best(
            region_logits + first_head.to(tl.int64) * padded,
            table + batch * stride_table_batch,
            budget + batch * stride_budget_batch,
            runs,
            taken,
            total,
            pair,
            regions,
            padded,
            places,
            GROUP,
            SELECTIONS,
            BY_MAX,
            PERIPHERY,
            COUNTS,
            1 if PER_HEAD else HEADS,
            BLOCK_ALL,
            WAYS,
        )


@triton.jit
def _slot_to_fill(offset, filled):
    slot = offset.to(tl.int64)
    if filled is not None:
        slot += tl.load(filled)
    return slot


@triton.jit
def _score_regions(
    p_query,
    p_means,
    p_counts,
    logits,
    region_logits,
    first_head,
    split,
    splits,
    scale,
    softcap,
    regions,
    padded,
    stride_query_head,
    stride_mean_window,
    stride_mean_dim,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WINDOWS: tl.constexpr,
    PERIPHERY: tl.constexpr,
    CAPPED: tl.constexpr,
    ONCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store the logits of this program's tiles of regions, and with PERIPHERY those of their windows."""
    rows, dims, cells = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R * BLOCK_C)
    region, column = cells // BLOCK_C, cells % BLOCK_C
    o_cell = (region * WINDOWS + column)[None, :] * stride_mean_window + dims[:, None] * stride_mean_dim
    p_query += rows[:, None] * stride_query_head + dims[None, :]
    q = tl.load(p_query, mask=(rows < GROUP)[:, None] & (dims < DIM)[None, :], other=0.0)
    o_head = (first_head + rows).to(tl.int64)[:, None]
    p_logits, p_regions = logits + o_head * (regions * WINDOWS), region_logits + o_head * padded
    size = _sizes(p_counts, split, region, column, regions, WINDOWS, BLOCK_R)
    # A single round is none for the compiler: all loads are asked for together.
    for tile in range(split, split + 1 if ONCE else tl.cdiv(padded, BLOCK_R), 1 if ONCE else splits):
        first = tile * BLOCK_R
        there = (first + region < regions) & (column < WINDOWS)
        p_tile = p_means + (first * WINDOWS).to(tl.int64) * stride_mean_window + o_cell
        mean = tl.load(p_tile, mask=there[None, :] & (dims < DIM)[:, None], other=0.0)
        # Asked for a tile ahead: what no product takes is not loaded early by itself.
        next_size = _sizes(p_counts, tile + splits, region, column, regions, WINDOWS, BLOCK_R)
        x = scores_of(tl.dot(q, mean, input_precision="ieee"), scale, softcap, CAPPED) + size[None, :]
        if PERIPHERY:
            window = (first + region) * WINDOWS + column
            tl.store(p_logits + window[None, :], x, mask=(rows < GROUP)[:, None] & there[None, :])
        numbers = first + tl.arange(0, BLOCK_R)
        inside = (rows < GROUP)[:, None] & (numbers < padded)[None, :]
        # Of each region by itself, so that equal regions weigh the same to the bit, wherever they are scored.
        logit = _log_sum_exp(x, BLOCK_M, BLOCK_R, BLOCK_C) if BLOCK_C > 1 else x
        tl.store(p_regions + numbers[None, :], logit, mask=inside)
        size = next_size


@triton.jit
def _take_best(
    p_scores,
    p_table,
    p_budget,
    runs,
    taken,
    total,
    pair,
    regions,
    padded,
    places,
    GROUP: tl.constexpr,
    SELECTIONS: tl.constexpr,
    BY_MAX: tl.constexpr,
    PERIPHERY: tl.constexpr,
    COUNTS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_ALL: tl.constexpr,
    WAYS: tl.constexpr,
    ABSENT: tl.constexpr = ABSENT,
    TOP: tl.constexpr = TOP,
):
    """Store which regions each selection of a (row, key head) pair reads, from the logits of all of them."""
    number = tl.arange(0, BLOCK_ALL)
    # Of one head: those of what is not there are the same for all.
    logit = tl.load(p_scores + number, mask=number < padded, other=ABSENT, cache_modifier=".cg")
    entry = tl.load(p_table + number, mask=number < regions, other=0)
    wanted = tl.load(p_budget)
    whole = 1.0 if BY_MAX else 1.0 * SELECTIONS / GROUP
    for selection in range(SELECTIONS):
        score = tl.zeros([BLOCK_ALL], tl.float32)
        for head in range(selection, selection + GROUP // SELECTIONS, AT_ONCE):
            shares = _shares(p_scores, head, padded, number, whole, GROUP, AT_ONCE)
            score = tl.maximum(score, tl.max(shares, 0)) if BY_MAX else score + tl.sum(shares, 0)
        bits = tl.where(score < 2.0, score.to(tl.int32, bitcast=True), TOP - 1)  # NaN is above all, as in the twin
        bits = tl.where(logit < ABSENT / 2, -1, bits)
        place = _places(bits, wanted, regions, WAYS, BLOCK_ALL)
        group = (pair * SELECTIONS + selection).to(tl.int64)
        p_runs = runs + group * places
        tl.store(p_runs + place, entry, mask=place >= 0)
        if wanted < places:
            tl.store(p_runs + number, 0, mask=(number >= wanted) & (number < places))
        if PERIPHERY:
            tl.store(taken + group * regions + number, (place >= 0).to(tl.int8), mask=number < regions)
        if COUNTS:
            tokens = tl.where(place >= 0, (entry >> 32).to(tl.int32), 0)
            tl.atomic_add(total, tl.sum(tokens, 0).to(tl.int64), sem="relaxed")


@triton.jit
def _entry(p_new, wanted, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    dims = tl.arange(0, BLOCK)
    return tl.load(p_new + dims, mask=dims < wanted * SIZE)


@triton.jit
def _append(p_store, entry, wanted, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    dims = tl.arange(0, BLOCK)
    tl.store(p_store + dims, entry.to(p_store.dtype.element_ty), mask=dims < wanted * SIZE)


@triton.jit
def _sizes(
    p_counts,
    tile,
    region,
    column,
    regions,
    WINDOWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ABSENT: tl.constexpr = ABSENT,
):
    """Logarithms of the tokens of a tile's windows."""
    there = (tile * BLOCK_R + region < regions) & (column < WINDOWS)
    return tl.load(p_counts + tile * (BLOCK_R * WINDOWS) + region * WINDOWS + column, mask=there, other=ABSENT)


@triton.jit
def _log_sum_exp(x, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Over the windows of every region.

    Padding and absent windows have logits so low that they add nothing."""
    by_region = tl.reshape(x, (BLOCK_M, BLOCK_R, BLOCK_C))
    top = tl.max(by_region, 2)
    return top + tl.log(tl.sum(tl.exp(by_region - top[:, :, None]), 2))


@triton.jit
def _shares(
    p_scores,
    head,
    padded,
    number,
    whole,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    LOG2E: tl.constexpr = LOG2E,
    LOWEST: tl.constexpr = LOWEST,
):
    """`[HEADS, R]` softmax over the regions of some heads, times `whole`; 0 for heads that are none."""
    heads = head + tl.arange(0, HEADS)
    inside = (heads < GROUP)[:, None] & (number < padded)[None, :]
    p_heads = p_scores + heads[:, None] * padded + number[None, :]
    x = tl.load(p_heads, mask=inside, other=-float("inf"), cache_modifier=".cg")
    weight = tl.exp2((x - tl.maximum(tl.max(x, 1), LOWEST)[:, None]) * LOG2E)
    return weight * (whole / tl.maximum(tl.sum(weight, 1), 1.0))[:, None]  # the largest weighs 1


@triton.jit
def _places(bits, wanted, regions, WAYS: tl.constexpr, BLOCK_ALL: tl.constexpr):
    """Of each region among the `wanted` best, by number; -1 for others. The first of equal ones, as in the twin."""
    threshold, top, above = _threshold(bits, wanted, regions, WAYS)
    over, among = bits >= top, (bits >= threshold) & (bits < top)
    before = _running_sum(over.to(tl.int32) + (among.to(tl.int32) << 16), BLOCK_ALL)
    rest = wanted - above
    take = over | (among & ((before >> 16) <= rest))
    return tl.where(take, (before & 0xFFFF) + tl.minimum(before >> 16, rest) - 1, -1)


@triton.jit
def _running_sum(x, SIZE: tl.constexpr):
    """Of 4 numbers at a time: as many as a thread holds side by side, which it adds up without asking others."""
    fours = tl.reshape(x, [SIZE // 4, 4])
    sums = tl.sum(fours, 1)
    return tl.reshape(tl.cumsum(fours, 1) + (tl.cumsum(sums, 0) - sums)[:, None], [SIZE])


@triton.jit
def _threshold(bits, wanted, regions, WAYS: tl.constexpr, TOP: tl.constexpr = TOP):
    """Where the `wanted` largest begin: `threshold`, `top` and how many are at least that, `above`.

    All of these are among the wanted, and the others lie between the two: all that do, or those with the lowest numbers
    where only one value does. The bits of a positive float grow with its value, so they are found by counting: of the
    range that they are in, cut at WAYS places, the part where the last of them is.
    """
    threshold, top = tl.min(tl.where(bits >= 0, bits, TOP), 0), tl.max(bits, 0) + 1
    above, held = wanted * 0, wanted * 0 + regions
    HALF: tl.constexpr = WAYS // 2
    ways, by_region = tl.arange(0, HALF) + 1, bits[:, None]
    while (held > wanted) & (top - threshold > 1):
        width = (top - threshold + WAYS) // (WAYS + 1)
        lower, upper = (threshold + ways * width)[None, :], (threshold + (ways + HALF) * width)[None, :]
        # Two counts a number: there are fewer than 65,536 regions.
        both = tl.sum((by_region >= lower).to(tl.int32) + ((by_region >= upper).to(tl.int32) << 16), 0)
        low, high = both & 0xFFFF, both >> 16
        low_enough, high_enough = low >= wanted, high >= wanted
        most = tl.maximum(tl.where(low_enough, 0, low), tl.where(high_enough, 0, high))
        least = tl.minimum(tl.where(low_enough, low, TOP), tl.where(high_enough, high, TOP))
        above, held = tl.maximum(above, tl.max(most, 0)), tl.minimum(held, tl.min(least, 0))
        threshold += tl.sum(low_enough.to(tl.int32) + high_enough.to(tl.int32), 0) * width
        top = tl.minimum(top, threshold + width)
    return threshold, top, above
