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
from gazepatch.kernels.device.best import places_of_best
from gazepatch.kernels.device.scores import scores_of
from gazepatch.kernels.device.weights import shares_of_tiles, weights_in_tile, weights_of
from gazepatch.regions import ABSENT  # the logit of a region that is not there, or less


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
        weight, top = weights_in_tile(x, BLOCK_M, BLOCK_R, BLOCK_C)
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
):
    """Store which regions each selection of a (row, key head) pair reads, from the weights of all of them."""
    number = tl.arange(0, BLOCK_ALL)
    TILES: tl.constexpr = BLOCK_ALL // BLOCK_R
    # Of one head: what is not there is the same for all.
    absent = tl.reshape(weights_of(p_weights, 0, padded, -1.0, GROUP, 1, BLOCK_ALL), [BLOCK_ALL]) < 0
    wanted = tl.load(p_budget)
    whole = 1.0 if BY_MAX else 1.0 * SELECTIONS / GROUP
    for selection in range(SELECTIONS):
        score = tl.zeros([TILES, BLOCK_R], tl.float32)
        for head in range(selection, selection + GROUP // SELECTIONS, AT_ONCE):
            weight = weights_of(p_weights, head, padded, 0.0, GROUP, AT_ONCE, BLOCK_ALL)
            share = shares_of_tiles(p_tiles, head, padded, tiles, whole, GROUP, AT_ONCE, TILES, BLOCK_R)
            shares = tl.reshape(weight, [AT_ONCE, TILES, BLOCK_R]) * share[:, :, None]
            score = tl.maximum(score, tl.max(shares, 0)) if BY_MAX else score + tl.sum(shares, 0)
        entry = tl.load(p_table + number, mask=number < regions)
        place = places_of_best(tl.reshape(score, [BLOCK_ALL]), absent, wanted, regions, BLOCK_ALL)
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
