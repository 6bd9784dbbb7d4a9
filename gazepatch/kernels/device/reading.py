"""What a program of the decode kernel reads, by kind of entry, tile by tile: each taken into running softmaxes.

A softmax is a maximum and a sum of every query head, and the weighted sum of values, of each warp by itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gazepatch.kernels.device.scores import LOG2E, scores_of


@triton.jit
def read_others(
    q,
    row_max,
    row_sum,
    acc,
    p_keys,
    p_values,
    p_bias,
    stride_key_token,
    stride_value_token,
    begin,
    end,
    others,
    cells,
    scale,
    softcap,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    LOG2E: tl.constexpr = LOG2E,
):
    """Entries that are always visible."""
    dims, value_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    in_dim, in_value = (dims < DIM)[None, None, :], (value_dims < VALUE_DIM)[None, :, None]
    p_keys, p_values = p_keys + dims[None, None, :], p_values + value_dims[None, :, None]
    for tile in range(begin, end):
        token = tile * BLOCK_N + cells
        there = token < others
        o_token = token.to(tl.int64)
        k = tl.load(p_keys + o_token[:, :, None] * stride_key_token, mask=there[:, :, None] & in_dim, other=0.0)
        v = tl.load(p_values + o_token[:, None, :] * stride_value_token, mask=there[:, None, :] & in_value, other=0.0)
        x = scores_of(_product(k, q, PARTS, PRECISION), scale, softcap, CAPPED)
        if HAS_BIAS:
            x += (tl.load(p_bias + token, mask=there, other=0.0) * LOG2E)[:, :, None]
        row_max, row_sum, acc = _attend(x, there, v, row_max, row_sum, acc, PARTS, PRECISION)
    return row_max, row_sum, acc


@triton.jit
def read_runs(
    q,
    row_max,
    row_sum,
    acc,
    p_keys,
    p_values,
    run,
    place,
    p_runs,
    begin,
    end,
    places,
    pieces,
    cells,
    scale,
    softcap,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    CAPPED: tl.constexpr,
    PER_TILE: tl.constexpr,
    IN_PIECES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Visual entries of the selected regions."""
    dims, value_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    in_dim, in_value = (dims < DIM)[None, None, :], (value_dims < VALUE_DIM)[None, :, None]
    piece = begin - place * pieces
    # `run` comes from a tile before: were it loaded in its own, all that a tile loads would wait for it. Not from two
    # before: Triton loads nothing ahead in loops that hand on what they were handed.
    for _ in range(begin, end):
        first, slot, there = _slots(run, piece, cells, PER_TILE, IN_PIECES, BLOCK_N)
        p_slots = p_keys + first * DIM + (slot[:, :, None] * DIM + dims[None, None, :])
        k = tl.load(p_slots, mask=there[:, :, None] & in_dim, other=0.0)
        p_slots = p_values + first * VALUE_DIM + (slot[:, None, :] * VALUE_DIM + value_dims[None, :, None])
        v = tl.load(p_slots, mask=there[:, None, :] & in_value, other=0.0)
        x = scores_of(_product(k, q, PARTS, PRECISION), scale, softcap, CAPPED)
        row_max, row_sum, acc = _attend(x, there, v, row_max, row_sum, acc, PARTS, PRECISION)
        place, piece = _after(place, piece, pieces, IN_PIECES)
        run = run_of(p_runs, place, cells, places, PER_TILE, BLOCK_N)
    return row_max, row_sum, acc


@triton.jit
def read_periphery(
    row_max,
    row_sum,
    acc,
    p_means,
    p_logits,
    p_taken,
    begin,
    end,
    to_runs,
    windows,
    cells,
    ROWS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WINDOWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    LOG2E: tl.constexpr = LOG2E,
):
    """Pseudo-tokens of the windows of all other regions."""
    rows, in_value = tl.arange(0, BLOCK_M), (tl.arange(0, BLOCK_V) < VALUE_DIM)[None, :, None]
    for tile in tl.range(begin, end, num_stages=2):  # more would spill registers
        window = (tile - to_runs) * BLOCK_N + cells
        inside = window < windows
        # What is read anyway is loaded all the same: a load that waits for no other is worth more.
        read = tl.load(p_taken + window // WINDOWS, mask=inside, other=1)
        shown = (rows < ROWS)[None, None, :] & inside[:, :, None]
        x = tl.load(p_logits + window[:, :, None], mask=shown, other=0.0) * LOG2E
        p_window = p_means + window.to(tl.int64)[:, None, :] * VALUE_DIM
        v = tl.load(p_window, mask=inside[:, None, :] & in_value, other=0.0)
        row_max, row_sum, acc = _attend(x, read == 0, v, row_max, row_sum, acc, PARTS, PRECISION)
    return row_max, row_sum, acc


@triton.jit
def run_of(p_runs, place, cells, places, PER_TILE: tl.constexpr, BLOCK_N: tl.constexpr):
    """First slots and tokens of the regions of a tile, PER_TILE for each place; zeros where there are none."""
    if PER_TILE > 1:
        place = place * PER_TILE + cells // (BLOCK_N // PER_TILE)
    return tl.load(p_runs + place, mask=place < places, other=0)


@triton.jit
def _after(place, piece, pieces, IN_PIECES: tl.constexpr):
    """Place and piece of the tile after one."""
    if IN_PIECES:
        is_last = piece + 1 == pieces
        place, piece = place + is_last.to(tl.int32), tl.where(is_last, 0, piece + 1)
    else:
        place += 1
    return place, piece


@triton.jit
def _slots(run, piece, cells, PER_TILE: tl.constexpr, IN_PIECES: tl.constexpr, BLOCK_N: tl.constexpr):
    """Slots of a tile, as a first one and what comes to it, and which are read.

    A tile is PER_TILE short regions, or a `piece` of a long one. It does not cross the ends of regions: what it leaves
    empty costs no reading, and every address follows from few numbers.
    """
    if PER_TILE == 1:
        before = piece * BLOCK_N if IN_PIECES else 0
        first, slot, there = (run & 0xFFFFFFFF) + before, cells, cells < (run >> 32).to(tl.int32) - before
    else:
        offset = cells % (BLOCK_N // PER_TILE)
        first, slot, there = 0, (run & 0xFFFFFFFF) + offset, offset < (run >> 32).to(tl.int32)
    return first, slot, there


@triton.jit
def _attend(x, shown, v, row_max, row_sum, acc, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """Take scores `x` `[P, N, M]`, in powers of two, and values `[P, D_v, N]` into running softmaxes, where `shown`."""
    x = tl.where(shown[:, :, None], x, -float("inf"))
    new_max = tl.maximum(row_max, tl.max(x, 1))
    p, keep = tl.exp2(x - new_max[:, None, :]), tl.exp2(row_max - new_max)
    acc = acc * keep[:, None, :] + _product(v, p.to(v.dtype), PARTS, PRECISION)
    return new_max, row_sum * keep + tl.sum(p, 1), acc


@triton.jit
def _product(x, y, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """`x @ y`, each warp a part of its own; where there is but one part, warps share it."""
    if PARTS > 1:
        product = tl.dot(x, y, input_precision=PRECISION)
    else:
        flat_x, flat_y = tl.reshape(x, [x.shape[1], x.shape[2]]), tl.reshape(y, [y.shape[1], y.shape[2]])
        product = tl.dot(flat_x, flat_y, input_precision=PRECISION)[None, :, :]
    return product
