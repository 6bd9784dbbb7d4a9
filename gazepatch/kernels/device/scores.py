"""From dot products to scores, in every kernel that attends: in powers of two, which is what exponents are cheap in."""

from __future__ import annotations

import triton
import triton.language as tl

# Kernels have constants as defaults of their arguments: all that they read of a module, Triton compares at every launch
# with what it was, which takes it microseconds.
LOG2E = 1.4426950408889634
#: Below every score, those of what is hidden too; finite, so that a program without entries gives 0 and not NaN.
LOWEST = -3e38


@triton.jit
def scores_of(products, scale, softcap, CAPPED: tl.constexpr):
    """`scale * products`; with a soft cap `softcap * tanh(scale * products)`, whose scale is divided by it before."""
    x = products * scale
    return softcap * (2.0 * tl.sigmoid(2.0 * x) - 1.0) if CAPPED else x


@triton.jit
def slope_of(score, softcap, CAPPED: tl.constexpr):
    """What a soft cap leaves of a change of the scaled products."""
    return 1.0 - (score / softcap) * (score / softcap) if CAPPED else 1.0


@triton.jit
def in_powers_of_two(scale, softcap, CAPPED: tl.constexpr, LOG2E: tl.constexpr = LOG2E):
    """Scale and soft cap for `scores_of`, so that it gives powers of two."""
    if CAPPED:
        scale, softcap = scale / softcap, softcap * LOG2E
    else:
        scale *= LOG2E
    return scale, softcap
