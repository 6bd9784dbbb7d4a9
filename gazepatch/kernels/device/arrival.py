"""How programs of one launch tell who is the last, and may read what all others stored."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def arrive(counter, WAITS: tl.constexpr):
    """Count this program in, after all its stores; returns how many were counted before.

    The thread that counts releases its own stores and, by the barrier, those of the others. On CDNA a barrier does not
    wait for stores of other waves that are still on their way, nor does the release: there each wave waits for its own.
    """
    if WAITS:
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)", "=r,0,~{memory}", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1
        )
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel")
