"""Score the windows, agree among the heads of a group, take the best regions. One launch.

Every program scores some regions of one (row, key head) pair. The last of a pair to finish, found by counting arrivals,
has all scores and takes the best regions: no second launch, and no sorting. The count is set back, so that nothing has
to be cleared between launches. By the way, one program of a pair appends the step's own entry to the others.

What a single program does at the end, all wait for. So exponentials are left to those before it: they store weights,
relative to what is largest in their tile, and the last one only multiplies them by what a tile weighs. It does so for
as many heads at a time as its registers hold, and looks for the threshold only until nothing is left to decide.
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
        "tiles",
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
    weights,  # out [B, H, padded] float32: a multiple of 16, of which those that are no regions weigh less than 0
    tile_max_and_sum,  # out [B, H, tiles, 2] float32: of tiles, what their weights are relative to, and their sum
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
    tiles,
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
        weights,
        tile_max_and_sum,
        first_head,
        split,
        splits,
        scale,
        softcap,
        regions,
        padded,
        tiles,
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
            weights + first_head.to(tl.int64) * padded,
            tile_max_and_sum + first_head.to(tl.int64) * (2 * tiles),
            table + batch * stride_table_batch,
            budget + batch * stride_budget_batch,
            runs,
            taken,
            total,
            pair,
            regions,
            padded,
            tiles,
            places,
            GROUP,
            SELECTIONS,
            BY_MAX,
            PERIPHERY,
            COUNTS,
            1 if PER_HEAD else HEADS,
            BLOCK_R,
            BLOCK_ALL,
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
    weights,
    tile_max_and_sum,
    first_head,
    split,
    splits,
    scale,
    softcap,
    regions,
    padded,
    tiles,
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
    ABSENT: tl.constexpr = ABSENT,
):
    """Store the weights of this program's tiles of regions, and with PERIPHERY the logits of their windows."""
    rows, dims, cells = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R * BLOCK_C)
    region, column = cells // BLOCK_C, cells % BLOCK_C
    p_query += rows[:, None] * stride_query_head + dims[None, :]
    q = tl.load(p_query, mask=(rows < GROUP)[:, None] & (dims < DIM)[None, :], other=0.0)
    o_cell = (region * WINDOWS + column)[None, :] * stride_mean_window + dims[:, None] * stride_mean_dim
    head = (first_head + rows).to(tl.int64)
    p_logits, p_weights = logits + head[:, None] * (regions * WINDOWS), weights + head[:, None] * padded
    p_tiles = tile_max_and_sum + head * (2 * tiles)
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
        weight, top = _weights(x, BLOCK_M, BLOCK_R, BLOCK_C)
        p_both = p_tiles[:, None] + (2 * tile + tl.arange(0, 2))[None, :]
        tl.store(p_both, tl.join(top, tl.sum(weight, 1)), mask=(rows < tl.where(first < padded, GROUP, 0))[:, None])
        numbers = first + tl.arange(0, BLOCK_R)
        inside = (rows < GROUP)[:, None] & (numbers < padded)[None, :]
        absent = (size if BLOCK_C == 1 else tl.max(tl.reshape(size, [BLOCK_R, BLOCK_C]), 1)) < ABSENT / 2
        tl.store(p_weights + numbers[None, :], tl.where(absent[None, :], -1.0, weight), mask=inside)
        size = next_size


@triton.jit
def _take_best(
    p_weights,
    p_tiles,
    p_table,
    p_budget,
    runs,
    taken,
    total,
    pair,
    regions,
    padded,
    tiles,
    places,
    GROUP: tl.constexpr,
    SELECTIONS: tl.constexpr,
    BY_MAX: tl.constexpr,
    PERIPHERY: tl.constexpr,
    COUNTS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_ALL: tl.constexpr,
    TOP: tl.constexpr = TOP,
):
    """Store which regions each selection of a (row, key head) pair reads, from the weights of all of them."""
    number = tl.arange(0, BLOCK_ALL)
    TILES: tl.constexpr = BLOCK_ALL // BLOCK_R
    # Of one head: what is not there is the same for all.
    absent = tl.reshape(_weights_of(p_weights, 0, padded, -1.0, GROUP, 1, BLOCK_ALL), [BLOCK_ALL]) < 0
    wanted = tl.load(p_budget)
    whole = 1.0 if BY_MAX else 1.0 * SELECTIONS / GROUP
    for selection in range(SELECTIONS):
        score = tl.zeros([TILES, BLOCK_R], tl.float32)
        for head in range(selection, selection + GROUP // SELECTIONS, AT_ONCE):
            weight = _weights_of(p_weights, head, padded, 0.0, GROUP, AT_ONCE, BLOCK_ALL)
            share = _share_of_tiles(p_tiles, head, padded, tiles, whole, GROUP, AT_ONCE, TILES, BLOCK_R)
            shares = tl.reshape(weight, [AT_ONCE, TILES, BLOCK_R]) * share[:, :, None]
            score = tl.maximum(score, tl.max(shares, 0)) if BY_MAX else score + tl.sum(shares, 0)
        entry = tl.load(p_table + number, mask=number < regions)
        score = tl.reshape(score, [BLOCK_ALL])
        # NaN is above all, as in the twin; what is absent, of whatever score, below.
        bits = tl.minimum(score.to(tl.uint32, bitcast=True), TOP - 1).to(tl.int32, bitcast=True)
        place = _places(tl.where(absent, -1, bits), wanted, regions, BLOCK_ALL)
        group = (pair * SELECTIONS + selection).to(tl.int64)
        if PERIPHERY:
            within = tl.reshape(number, [TILES, BLOCK_R])
            is_taken = tl.reshape(place >= 0, [TILES, BLOCK_R]).to(tl.int8)
            tl.store(taken + group * regions + within, is_taken, mask=within < regions)
        p_runs = runs + group * places
        # To the threads that store each: here, so that this alone changes hands, and not all that follows from it.
        place = tl.gather(place, number, 0)
        tl.store(p_runs + place, entry, mask=place >= 0)
        if wanted < places:
            tl.store(p_runs + number, 0, mask=(number >= wanted) & (number < places))
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
def _weights(x, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, LOG2E: tl.constexpr = LOG2E):
    """`[M, R]` sums of a region's exponentials, divided by a power of two, and `[M]` which power it was.

    Nothing is rounded by that, so equal regions weigh the same to the bit, wherever they are scored.
    """
    y = x * LOG2E
    whole = (y + 12582912.0) - 12582912.0  # to the nearest whole number: so large floats have nothing after the point
    top = tl.max(whole, 1)
    weight = tl.exp2(y - whole) * _power_of_two(whole - top[:, None])
    return weight if BLOCK_C == 1 else tl.sum(tl.reshape(weight, [BLOCK_M, BLOCK_R, BLOCK_C]), 2), top


@triton.jit
def _power_of_two(n):
    """Of whole numbers up to 0; 0 from -127 on. Exact, and cheap: a sum whose last bits are those of the exponent."""
    return ((tl.maximum(n, -127.0) + (8388608.0 + 127.0)).to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _weights_of(p_weights, head, padded, other, GROUP: tl.constexpr, HEADS: tl.constexpr, BLOCK_ALL: tl.constexpr):
    """`[HEADS, R]` from some head on; `other` for heads and regions that are none."""
    heads, number = head + tl.arange(0, HEADS), tl.arange(0, BLOCK_ALL)
    inside = (heads < GROUP)[:, None] & (number < padded)[None, :]
    p_heads = p_weights + heads[:, None] * padded + number[None, :]
    return tl.load(p_heads, mask=inside, other=other, cache_modifier=".cg")


@triton.jit
def _share_of_tiles(
    p_tiles,
    head,
    padded,
    tiles,
    whole,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    LOWEST: tl.constexpr = LOWEST,
):
    """`[HEADS, TILES]` share, times `whole`, of a region that weighs 1; 0 for heads and tiles that are none."""
    heads, number = head + tl.arange(0, HEADS), tl.arange(0, 2 * TILES)
    inside = (heads < GROUP)[:, None] & (number // 2 * BLOCK_R < padded)[None, :]
    p_both = p_tiles + heads[:, None] * (2 * tiles) + number[None, :]
    both = tl.load(p_both, mask=inside, other=LOWEST, cache_modifier=".cg")
    top, total = tl.split(tl.reshape(both, [HEADS, TILES, 2]))
    part = tl.where(total < 0, 0.0, _power_of_two(top - tl.max(top, 1)[:, None]))
    sums = tl.maximum(tl.sum(part * total, 1), 0.5)  # the largest weighs more
    return part * (whole / sums)[:, None]


@triton.jit
def _places(bits, wanted, regions, BLOCK_ALL: tl.constexpr):
    """Of each region among the `wanted` best, by number; -1 for others. The first of equal ones, as in the twin."""
    # As many as a thread holds side by side, which it adds up without asking others.
    fours = tl.reshape(bits, [BLOCK_ALL // 4, 4])
    threshold, top, above = _threshold(fours, wanted, regions, BLOCK_ALL)
    # Two counts a number, as below: there are fewer than 65,536 regions.
    one = tl.where(fours >= top, 1 << 16, tl.where(fours >= threshold, 1, 0))
    upto = _running_sum(one, BLOCK_ALL)
    over, among, rest = upto >> 16, upto & 0xFFFF, wanted - above
    take = one > (among > rest).to(tl.int32)
    return tl.reshape(tl.where(take, over + tl.minimum(among, rest) - 1, -1), [BLOCK_ALL])


@triton.jit
def _running_sum(fours, BLOCK_ALL: tl.constexpr):
    """Of four neighbours at a time, which are one thread's, so that few numbers are asked of others."""
    even, odd = tl.split(tl.reshape(fours, [BLOCK_ALL // 4, 2, 2]))
    one, third = tl.split(even)
    second, fourth = tl.split(odd)
    two = one + second
    three = two + third
    four = three + fourth
    before = tl.cumsum(four, 0) - four
    even, odd = tl.join(before + one, before + three), tl.join(before + two, before + four)
    return tl.reshape(tl.join(even, odd), [BLOCK_ALL // 4, 4])


@triton.jit
def _threshold(fours, wanted, regions, BLOCK_ALL: tl.constexpr, TOP: tl.constexpr = TOP):
    """Where the `wanted` largest begin: `threshold`, `top` and how many are at least that, `above`.

    All of these are among the wanted, and the others lie between the two: all that do, or those with the lowest numbers
    where only one value does. The bits of a positive float grow with its value, so they are found by counting: of the
    range that they are in, cut at 4 places, the part where the last of them is.
    """
    # Both ends by one look at other threads, and of those that are there: -1 is least both ways, without signs.
    top, lowest = tl.split(tl.max(tl.join(_most(fours + 1), _most(~fours)), 0))
    threshold, top = tl.maximum(~lowest.to(tl.int32), 0), top.to(tl.int32)
    above, held = wanted * 0, wanted * 0 + regions
    while (held > wanted) & (top - threshold > 1):
        width = (top - threshold + 4) // 5
        cut = threshold + width
        first = _less(fours, cut) + (_less(fours, cut + width) << 16)
        second = _less(fours, cut + 2 * width) + (_less(fours, cut + 3 * width) << 16)
        first, second = tl.split(tl.sum(tl.join(first, second), 0))
        less = (first & 0xFFFF, first >> 16, second & 0xFFFF, second >> 16)
        for i in tl.static_range(4):
            count = BLOCK_ALL - less[i]
            enough = count >= wanted
            held, above = tl.where(enough, count, held), tl.maximum(above, tl.where(enough, 0, count))
            threshold += tl.where(enough, width, 0)
        top = tl.minimum(top, threshold + width)
    return threshold, top, above


@triton.jit
def _most(fours):
    return tl.max(fours.to(tl.uint32, bitcast=True), 1)


@triton.jit
def _less(fours, cut):
    """How many of four are: by the signs of differences, which take fewer instructions than comparisons."""
    return tl.sum((fours - cut).to(tl.uint32, bitcast=True) >> 31, 1).to(tl.int32)
