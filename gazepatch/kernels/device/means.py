"""The mean of every window. Its tokens lie one after the other, so nothing is added up atomically."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["windows", "longest", "stride_table_batch"])
def means_kernel(
    entries,  # [B, H, N, D] in slot order, last axis dense
    start,  # [b, W] int32 first slot of a window
    length,  # [b, W] int32 its tokens
    means,  # out [B, H, W, D]
    heads,
    windows,
    longest,
    stride_entry_batch,
    stride_entry_head,
    stride_entry_token,
    stride_table_batch,
    DIM: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pair = tl.program_id(1)  # of windows there may be more than the second axis of a grid takes
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    window, dims = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W), tl.arange(0, BLOCK_D)
    there = window < windows
    first = tl.load(start + batch * stride_table_batch + window, mask=there, other=0).to(tl.int64)
    tokens = tl.load(length + batch * stride_table_batch + window, mask=there, other=0)
    p_entries = (
        entries + batch * stride_entry_batch + head * stride_entry_head + first[:, None, None] * stride_entry_token
    )
    total = tl.zeros([BLOCK_W, BLOCK_D], tl.float32)
    for at in range(0, longest, BLOCK_T):
        token = at + tl.arange(0, BLOCK_T)
        held = (token[None, :] < tokens[:, None])[:, :, None] & (dims < DIM)[None, None, :]
        p_tokens = p_entries + token[None, :, None] * stride_entry_token + dims[None, None, :]
        total += tl.sum(tl.load(p_tokens, mask=held, other=0.0).to(tl.float32), 1)
    mean = total / tl.maximum(tokens, 1).to(tl.float32)[:, None]
    p_means = means + (pair.to(tl.int64) * windows + window)[:, None] * DIM + dims[None, :]
    tl.store(p_means, mean.to(means.dtype.element_ty), mask=there[:, None] & (dims < DIM)[None, :])
