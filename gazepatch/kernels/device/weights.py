"""The weights of a softmax over regions, found tile by tile, and put together without rounding.

A tile's weights are relative to a power of two of its own, so that what comes to them later multiplies them exactly:
equal regions weigh the same to the bit, wherever they are scored, and ties stay ties.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gazepatch.kernels.device.scores import LOG2E, LOWEST

#: A float of this size has no bits for what comes after the point: a number that is added to it is rounded.
ROUNDS = 1.5 * 2**23
#: The last bits of such a float, plus a whole number, are those of the exponent of a float.
EXPONENT = 2.0**23 + 127


@triton.jit
def weights_in_tile(
    x,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LOG2E: tl.constexpr = LOG2E,
    ROUNDS: tl.constexpr = ROUNDS,
):
    """`[M, R]` sums of a region's exponentials, divided by a power of two, and `[M]` which power it was."""
    y = x * LOG2E
    whole = (y + ROUNDS) - ROUNDS
    top = tl.max(whole, 1)
    weight = tl.exp2(y - whole) * _power_of_two(whole - top[:, None])
    return weight if BLOCK_C == 1 else tl.sum(tl.reshape(weight, [BLOCK_M, BLOCK_R, BLOCK_C]), 2), top


@triton.jit
def _power_of_two(n, EXPONENT: tl.constexpr = EXPONENT):
    """Of whole numbers up to 0; 0 from -127 on. Exact, in three instructions."""
    return ((tl.maximum(n, -127.0) + EXPONENT).to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)


@triton.jit
def weights_of(p_weights, head, padded, other, GROUP: tl.constexpr, HEADS: tl.constexpr, BLOCK_ALL: tl.constexpr):
    """`[HEADS, R]` from some head on; `other` for heads and regions that are none."""
    heads, number = head + tl.arange(0, HEADS), tl.arange(0, BLOCK_ALL)
    inside = (heads < GROUP)[:, None] & (number < padded)[None, :]
    p_heads = p_weights + heads[:, None] * padded + number[None, :]
    return tl.load(p_heads, mask=inside, other=other, cache_modifier=".cg")


@triton.jit
def shares_of_tiles(
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
