"""Attention of the routed queries of a prompt, forward and backward: each query reads the regions it has taken.

Keys are in the order of the sequence. The queries of a key head lie one after the other, with their G heads next to
each other: row i is head i % G of query i // G. A row sees a key that is no visual token, or whose region it has taken.

Source: the backward pass as in FlashAttention-2, https://arxiv.org/abs/2307.08691.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gazepatch.kernels.device.scores import LOG2E, LOWEST, in_powers_of_two, scores_of, slope_of

UNSPECIALISED = ["rows", "queries", "length", "regions", "stride_region_batch", "stride_bias_batch"]


@triton.jit(do_not_specialize=UNSPECIALISED)
def forward_kernel(
    query,  # [B, H_kv, M, D], dense like all that follows
    key,  # [B, H_kv, L, D], last axis dense
    value,  # [B, H_kv, L, D_v], last axis dense
    region_of,  # [b, L] int32, -1 for no visual token
    taken,  # [B, H_kv, Q, g, R] int8
    positions,  # [Q] int32: keys after it are hidden, without a bias
    bias,  # [b, Q, L] float32, with HAS_BIAS
    output,  # out [B, H_kv, M, D_v]
    lse,  # out [B, H_kv, M] float32, log-sum-exp
    scale,
    softcap,
    key_heads,
    rows,
    queries,
    length,
    regions,
    stride_key_batch,
    stride_key_head,
    stride_key_token,
    stride_value_batch,
    stride_value_head,
    stride_value_token,
    stride_region_batch,
    stride_bias_batch,
    GROUP: tl.constexpr,
    SELECTIONS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LOG2E: tl.constexpr = LOG2E,
    LOWEST: tl.constexpr = LOWEST,
):
    pair, batch, head = _pair(key_heads)
    p_key = key + batch * stride_key_batch + head * stride_key_head
    p_value = value + batch * stride_value_batch + head * stride_value_head
    row, dims, value_dims = _rows(BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    q = _load_rows(query, pair, row, rows, dims, DIM)
    p_taken = _taken_pointers(taken, pair, row, queries, regions, GROUP, SELECTIONS)
    p_region = region_of + batch * stride_region_batch
    p_bias = _bias_pointers(bias, batch, row[:, None] // GROUP, stride_bias_batch, length, HAS_BIAS)
    position = tl.load(positions + row // GROUP, mask=row < rows, other=-1)
    by, cap = in_powers_of_two(scale, softcap, CAPPED)
    row_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    last = length
    if not HAS_BIAS:
        last = tl.minimum(length, tl.max(position, 0) + 1)
    for at in range(0, last, BLOCK_N):
        token = at + tl.arange(0, BLOCK_N)
        k = _load_tokens(p_key, token, length, stride_key_token, dims, DIM)
        v = _load_tokens(p_value, token, length, stride_value_token, value_dims, VALUE_DIM)
        seen = _seen(p_region, p_taken, token[None, :], length, row[:, None], rows, position[:, None], HAS_BIAS)
        x = scores_of(tl.dot(q, tl.trans(k), input_precision="ieee"), by, cap, CAPPED)
        x = _shown(x, seen, p_bias, token[None, :], HAS_BIAS)
        new_max = tl.maximum(row_max, tl.max(x, 1))
        p, keep = tl.exp2(x - new_max[:, None]), tl.exp2(row_max - new_max)
        acc = acc * keep[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        row_sum, row_max = row_sum * keep + tl.sum(p, 1), new_max
    # A row that sees nothing, of padding, is 0.
    some = tl.where(row_sum > 0, row_sum, 1.0)
    _store_rows(output, acc / some[:, None], pair, row, rows, value_dims, VALUE_DIM)
    tl.store(lse + pair.to(tl.int64) * rows + row, (row_max + tl.log2(some)) / LOG2E, mask=row < rows)


@triton.jit(do_not_specialize=UNSPECIALISED)
def query_gradient_kernel(
    query,
    key,
    value,
    region_of,
    taken,
    positions,
    bias,
    lse,  # [B, H_kv, M] float32
    d_output,  # [B, H_kv, M, D_v]
    delta,  # [B, H_kv, M] float32: sum(output * d_output) - d_lse
    d_query,  # out [B, H_kv, M, D]
    scale,
    softcap,
    key_heads,
    rows,
    queries,
    length,
    regions,
    stride_key_batch,
    stride_key_head,
    stride_key_token,
    stride_value_batch,
    stride_value_head,
    stride_value_token,
    stride_region_batch,
    stride_bias_batch,
    GROUP: tl.constexpr,
    SELECTIONS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LOG2E: tl.constexpr = LOG2E,
):
    pair, batch, head = _pair(key_heads)
    p_key = key + batch * stride_key_batch + head * stride_key_head
    p_value = value + batch * stride_value_batch + head * stride_value_head
    row, dims, value_dims = _rows(BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    q = _load_rows(query, pair, row, rows, dims, DIM)
    d_o = _load_rows(d_output, pair, row, rows, value_dims, VALUE_DIM)
    o_row = pair.to(tl.int64) * rows + row
    log_sum = tl.load(lse + o_row, mask=row < rows, other=0.0) * LOG2E
    d = tl.load(delta + o_row, mask=row < rows, other=0.0)
    p_taken = _taken_pointers(taken, pair, row, queries, regions, GROUP, SELECTIONS)
    p_region = region_of + batch * stride_region_batch
    p_bias = _bias_pointers(bias, batch, row[:, None] // GROUP, stride_bias_batch, length, HAS_BIAS)
    position = tl.load(positions + row // GROUP, mask=row < rows, other=-1)
    by, cap = in_powers_of_two(scale, softcap, CAPPED)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    last = length
    if not HAS_BIAS:
        last = tl.minimum(length, tl.max(position, 0) + 1)
    for at in range(0, last, BLOCK_N):
        token = at + tl.arange(0, BLOCK_N)
        k = _load_tokens(p_key, token, length, stride_key_token, dims, DIM)
        v = _load_tokens(p_value, token, length, stride_value_token, value_dims, VALUE_DIM)
        seen = _seen(p_region, p_taken, token[None, :], length, row[:, None], rows, position[:, None], HAS_BIAS)
        x = scores_of(tl.dot(q, tl.trans(k), input_precision="ieee"), by, cap, CAPPED)
        p = tl.exp2(_shown(x, seen, p_bias, token[None, :], HAS_BIAS) - log_sum[:, None])
        d_s = p * (tl.dot(d_o, tl.trans(v), input_precision="ieee") - d[:, None]) * slope_of(x, cap, CAPPED)
        acc += tl.dot(d_s.to(k.dtype), k, input_precision="ieee")
    _store_rows(d_query, acc * scale, pair, row, rows, dims, DIM)


@triton.jit(do_not_specialize=UNSPECIALISED)
def key_gradient_kernel(
    query,
    key,
    value,
    region_of,
    taken,
    positions,
    bias,
    lse,
    d_output,
    delta,
    d_key,  # out [B, H_kv, L, D]
    d_value,  # out [B, H_kv, L, D_v]
    scale,
    softcap,
    key_heads,
    rows,
    queries,
    length,
    regions,
    stride_key_batch,
    stride_key_head,
    stride_key_token,
    stride_value_batch,
    stride_value_head,
    stride_value_token,
    stride_region_batch,
    stride_bias_batch,
    GROUP: tl.constexpr,
    SELECTIONS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LOG2E: tl.constexpr = LOG2E,
):
    pair, batch, head = _pair(key_heads)
    p_key = key + batch * stride_key_batch + head * stride_key_head
    p_value = value + batch * stride_value_batch + head * stride_value_head
    token, dims, value_dims = _rows(BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    k = _load_tokens(p_key, token, length, stride_key_token, dims, DIM)
    v = _load_tokens(p_value, token, length, stride_value_token, value_dims, VALUE_DIM)
    p_region = region_of + batch * stride_region_batch
    by, cap = in_powers_of_two(scale, softcap, CAPPED)
    d_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    d_v = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for at in range(0, rows, BLOCK_M):
        row = at + tl.arange(0, BLOCK_M)
        q = _load_rows(query, pair, row, rows, dims, DIM)
        d_o = _load_rows(d_output, pair, row, rows, value_dims, VALUE_DIM)
        o_row = pair.to(tl.int64) * rows + row
        log_sum = tl.load(lse + o_row, mask=row < rows, other=0.0) * LOG2E
        d = tl.load(delta + o_row, mask=row < rows, other=0.0)
        p_taken = tl.trans(_taken_pointers(taken, pair, row, queries, regions, GROUP, SELECTIONS))
        position = tl.load(positions + row // GROUP, mask=row < rows, other=-1)
        seen = _seen(p_region, p_taken, token[:, None], length, row[None, :], rows, position[None, :], HAS_BIAS)
        x = scores_of(tl.dot(k, tl.trans(q), input_precision="ieee"), by, cap, CAPPED)
        p_bias = _bias_pointers(bias, batch, row[None, :] // GROUP, stride_bias_batch, length, HAS_BIAS)
        p = tl.exp2(_shown(x, seen, p_bias, token[:, None], HAS_BIAS) - log_sum[None, :])
        d_v += tl.dot(p.to(d_o.dtype), d_o, input_precision="ieee")
        d_s = p * (tl.dot(v, tl.trans(d_o), input_precision="ieee") - d[None, :]) * slope_of(x, cap, CAPPED)
        d_k += tl.dot(d_s.to(q.dtype), q, input_precision="ieee")
    _store_rows(d_key, d_k * scale, pair, token, length, dims, DIM)
    _store_rows(d_value, d_v, pair, token, length, value_dims, VALUE_DIM)


@triton.jit
def _pair(key_heads):
    """This program's (row, key head) pair, and its parts."""
    pair = tl.program_id(1)
    return pair, (pair // key_heads).to(tl.int64), (pair % key_heads).to(tl.int64)


@triton.jit
def _rows(BLOCK: tl.constexpr):
    return tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _load_rows(pointer, pair, row, rows, dims, DIM: tl.constexpr):
    """Rows of a dense `[B, H_kv, rows, DIM]`."""
    o_row = (pair.to(tl.int64) * rows + row)[:, None] * DIM + dims[None, :]
    return tl.load(pointer + o_row, mask=(row < rows)[:, None] & (dims < DIM)[None, :], other=0.0)


@triton.jit
def _store_rows(pointer, x, pair, row, rows, dims, DIM: tl.constexpr):
    o_row = (pair.to(tl.int64) * rows + row)[:, None] * DIM + dims[None, :]
    tl.store(pointer + o_row, x.to(pointer.dtype.element_ty), mask=(row < rows)[:, None] & (dims < DIM)[None, :])


@triton.jit
def _load_tokens(pointer, token, length, stride_token, dims, DIM: tl.constexpr):
    p_token = pointer + token.to(tl.int64)[:, None] * stride_token + dims[None, :]
    return tl.load(p_token, mask=(token < length)[:, None] & (dims < DIM)[None, :], other=0.0)


@triton.jit
def _taken_pointers(taken, pair, row, queries, regions, GROUP: tl.constexpr, SELECTIONS: tl.constexpr):
    """Where the regions of each row begin, `[M, 1]`."""
    query = pair.to(tl.int64) * queries + row // GROUP
    selection = query * SELECTIONS + (row % GROUP if SELECTIONS > 1 else 0)
    return taken + selection[:, None] * regions


@triton.jit
def _bias_pointers(bias, batch, query, stride_bias_batch, length, HAS_BIAS: tl.constexpr):
    """Where the biases of each query begin; a number that nobody uses without them, as Triton 3.6 returns no None."""
    return bias + batch * stride_bias_batch + query.to(tl.int64) * length if HAS_BIAS else 0


@triton.jit
def _shown(x, seen, p_bias, token, HAS_BIAS: tl.constexpr, LOG2E: tl.constexpr = LOG2E):
    """Scores `x` with their biases, -inf where a row does not see a token."""
    if HAS_BIAS:
        x += tl.load(p_bias + token, mask=seen, other=0.0) * LOG2E
    return tl.where(seen, x, -float("inf"))


@triton.jit
def _seen(p_region, p_taken, token, length, row, rows, position, HAS_BIAS: tl.constexpr):
    """Which rows see which tokens, in either order: all arguments broadcast to it."""
    there = (token < length) & (row < rows)
    region = tl.load(p_region + token, mask=token < length, other=-1)
    seen = there & ((region < 0) | (tl.load(p_taken + region, mask=there & (region >= 0), other=0) > 0))
    return seen if HAS_BIAS else seen & (token <= position)
