"""Which of many numbers are the largest, by counting: nothing is sorted."""

from __future__ import annotations

import triton
import triton.language as tl

#: Above the bits of every score, which is below 2 and not negative: such bits grow with their value.
TOP = 1 << 30


@triton.jit
def places_of_best(score, absent, wanted, regions, BLOCK_ALL: tl.constexpr, TOP: tl.constexpr = TOP):
    """Of each region among the `wanted` best, by number; -1 for others. The first of equal ones, as in the twin."""
    # NaN is above all, as in the twin; what is absent, of whatever score, below.
    bits = tl.minimum(score.to(tl.uint32, bitcast=True), TOP - 1).to(tl.int32, bitcast=True)
    bits = tl.where(absent, -1, bits)
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
def _threshold(fours, wanted, regions, BLOCK_ALL: tl.constexpr):
    """Where the `wanted` largest begin: `threshold`, `top` and how many are at least that, `above`.

    All of these are among the wanted, and the others lie between the two: all that do, or those with the lowest numbers
    where only one value does. They are found by counting: of the range that they are in, cut at 4 places, the part
    where the last of them is.
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
