"""Attention of the routed queries of a prompt, forward and backward: each query reads the regions it has taken.

Keys are in the order of the sequence. The queries of a key head lie one behind the other, with their G heads next to
each other: row i is head i % G of query i // G. A row sees a key that is no visual token, or whose region it has taken.

Source: the backward pass as in FlashAttention-2, https://arxiv.org/abs/2307.08691.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gazepatch.kernels.device.scores import LOG2E, LOWEST, in_powers_of_two, scores_of, slope_of

UNSPECIALISED = ["rows", "queries", "length", "regions", "region_row", "bias_row"]


@triton.jit(do_not_specialize=UNSPECIALISED)
def forward_kernel(
    query,  # [B, H_kv, M, D], dense like all that follows
    key,  # [B, H_kv, L, D], last axis dense
    value,  # [B, H_kv, L, D_v], last axis dense
    region_of,  # [b, L] int32, -1 for no visual token
    taken,  # [B, H_kv, Q, g, R] int8
    positions,  # [Q] int32: what lies behind is hidden, without a bias
    bias,  # [b, Q, L] float32, with HAS_BIAS
    output,  # out [B, H_kv, M, D_v]
    weight,  # out [B, H_kv, M] float32, log-sum-exp
    scale,
    softcap,
    key_heads,
    rows,
    queries,
    length,
    regions,
    key_row,
    key_head,
    key_token,
    value_row,
    value_head,
    value_token,
    region_row,
    bias_row,
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
    row, dims, value_dims = _rows(BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    q = _load_rows(query, pair, row, rows, dims, DIM)
    of_taken = _of_taken(taken, pair, row, queries, regions, GROUP, SELECTIONS)
    of_region = region_of + batch * region_row
    of_bias = _of_bias(bias, batch, row[:, None] // GROUP, bias_row, length, HAS_BIAS)
    position = tl.load(positions + row // GROUP, mask=row < rows, other=-1)
    by, cap = in_powers_of_two(scale, softcap, CAPPED)
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    last = length
    if not HAS_BIAS:
        last = tl.minimum(length, tl.max(position, 0) + 1)
    for at in range(0, last, BLOCK_N):
        token = at + tl.arange(0, BLOCK_N)
        k = _load_tokens(key, batch, head, token, length, dims, key_row, key_head, key_token, DIM)
        v = _load_tokens(value, batch, head, token, length, value_dims, value_row, value_head, value_token, VALUE_DIM)
        seen = _seen(of_region, of_taken, token[None, :], length, row[:, None], rows, position[:, None], HAS_BIAS)
        x = scores_of(tl.dot(q, tl.trans(k), input_precision="ieee"), by, cap, CAPPED)
        x = _shown(x, seen, of_bias, token[None, :], HAS_BIAS)
        highest = tl.maximum(top, tl.max(x, 1))
        p, kept = tl.exp2(x - highest[:, None]), tl.exp2(top - highest)
        acc = acc * kept[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        total, top = total * kept + tl.sum(p, 1), highest
    # A row that sees nothing, of padding, is 0.
    some = tl.where(total > 0, total, 1.0)
    _store_rows(output, acc / some[:, None], pair, row, rows, value_dims, VALUE_DIM)
    tl.store(weight + pair.to(tl.int64) * rows + row, (top + tl.log2(some)) / LOG2E, mask=row < rows)


@triton.jit(do_not_specialize=UNSPECIALISED)
def query_gradient_kernel(
    query,
    key,
    value,
    region_of,
    taken,
    positions,
    bias,
    weight,  # [B, H_kv, M] float32
    gradient,  # [B, H_kv, M, D_v] of the output
    delta,  # [B, H_kv, M] float32: sum of output * gradient, less the gradient of the weight
    query_gradient,  # out [B, H_kv, M, D]
    scale,
    softcap,
    key_heads,
    rows,
    queries,
    length,
    regions,
    key_row,
    key_head,
    key_token,
    value_row,
    value_head,
    value_token,
    region_row,
    bias_row,
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
    row, dims, value_dims = _rows(BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    q = _load_rows(query, pair, row, rows, dims, DIM)
    g = _load_rows(gradient, pair, row, rows, value_dims, VALUE_DIM)
    of_weight = pair.to(tl.int64) * rows + row
    log_total = tl.load(weight + of_weight, mask=row < rows, other=0.0) * LOG2E
    less = tl.load(delta + of_weight, mask=row < rows, other=0.0)
    of_taken = _of_taken(taken, pair, row, queries, regions, GROUP, SELECTIONS)
    of_region = region_of + batch * region_row
    of_bias = _of_bias(bias, batch, row[:, None] // GROUP, bias_row, length, HAS_BIAS)
    position = tl.load(positions + row // GROUP, mask=row < rows, other=-1)
    by, cap = in_powers_of_two(scale, softcap, CAPPED)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    last = length
    if not HAS_BIAS:
        last = tl.minimum(length, tl.max(position, 0) + 1)
    for at in range(0, last, BLOCK_N):
        token = at + tl.arange(0, BLOCK_N)
        k = _load_tokens(key, batch, head, token, length, dims, key_row, key_head, key_token, DIM)
        v = _load_tokens(value, batch, head, token, length, value_dims, value_row, value_head, value_token, VALUE_DIM)
        seen = _seen(of_region, of_taken, token[None, :], length, row[:, None], rows, position[:, None], HAS_BIAS)
        x = scores_of(tl.dot(q, tl.trans(k), input_precision="ieee"), by, cap, CAPPED)
        p = tl.exp2(_shown(x, seen, of_bias, token[None, :], HAS_BIAS) - log_total[:, None])
        inner = p * (tl.dot(g, tl.trans(v), input_precision="ieee") - less[:, None]) * slope_of(x, cap, CAPPED)
        acc += tl.dot(inner.to(k.dtype), k, input_precision="ieee")
    _store_rows(query_gradient, acc * scale, pair, row, rows, dims, DIM)


@triton.jit(do_not_specialize=UNSPECIALISED)
def key_gradient_kernel(
    query,
    key,
    value,
    region_of,
    taken,
    positions,
    bias,
    weight,
    gradient,
    delta,
    key_gradient,  # out [B, H_kv, L, D]
    value_gradient,  # out [B, H_kv, L, D_v]
    scale,
    softcap,
    key_heads,
    rows,
    queries,
    length,
    regions,
    key_row,
    key_head,
    key_token,
    value_row,
    value_head,
    value_token,
    region_row,
    bias_row,
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
    token, dims, value_dims = _rows(BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    k = _load_tokens(key, batch, head, token, length, dims, key_row, key_head, key_token, DIM)
    v = _load_tokens(value, batch, head, token, length, value_dims, value_row, value_head, value_token, VALUE_DIM)
    of_region = region_of + batch * region_row
    by, cap = in_powers_of_two(scale, softcap, CAPPED)
    of_keys = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    of_values = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for at in range(0, rows, BLOCK_M):
        row = at + tl.arange(0, BLOCK_M)
        q = _load_rows(query, pair, row, rows, dims, DIM)
        g = _load_rows(gradient, pair, row, rows, value_dims, VALUE_DIM)
        of_weight = pair.to(tl.int64) * rows + row
        log_total = tl.load(weight + of_weight, mask=row < rows, other=0.0) * LOG2E
        less = tl.load(delta + of_weight, mask=row < rows, other=0.0)
        of_taken = tl.trans(_of_taken(taken, pair, row, queries, regions, GROUP, SELECTIONS))
        position = tl.load(positions + row // GROUP, mask=row < rows, other=-1)
        seen = _seen(of_region, of_taken, token[:, None], length, row[None, :], rows, position[None, :], HAS_BIAS)
        x = scores_of(tl.dot(k, tl.trans(q), input_precision="ieee"), by, cap, CAPPED)
        of_bias = _of_bias(bias, batch, row[None, :] // GROUP, bias_row, length, HAS_BIAS)
        p = tl.exp2(_shown(x, seen, of_bias, token[:, None], HAS_BIAS) - log_total[None, :])
        of_values += tl.dot(p.to(g.dtype), g, input_precision="ieee")
        inner = p * (tl.dot(v, tl.trans(g), input_precision="ieee") - less[None, :]) * slope_of(x, cap, CAPPED)
        of_keys += tl.dot(inner.to(q.dtype), q, input_precision="ieee")
    _store_rows(key_gradient, of_keys * scale, pair, token, length, dims, DIM)
    _store_rows(value_gradient, of_values, pair, token, length, value_dims, VALUE_DIM)


@triton.jit
def _pair(key_heads):
    """This program's (row, key head) pair, and its parts."""
    pair = tl.program_id(1)
    return pair, (pair // key_heads).to(tl.int64), (pair % key_heads).to(tl.int64)


@triton.jit
def _rows(BLOCK: tl.constexpr):
    return tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _load_rows(of, pair, row, rows, dims, DIM: tl.constexpr):
    """Rows of a dense `[B, H_kv, rows, DIM]`."""
    at = (pair.to(tl.int64) * rows + row)[:, None] * DIM + dims[None, :]
    return tl.load(of + at, mask=(row < rows)[:, None] & (dims < DIM)[None, :], other=0.0)


@triton.jit
def _store_rows(to, x, pair, row, rows, dims, DIM: tl.constexpr):
    at = (pair.to(tl.int64) * rows + row)[:, None] * DIM + dims[None, :]
    tl.store(to + at, x.to(to.dtype.element_ty), mask=(row < rows)[:, None] & (dims < DIM)[None, :])


@triton.jit
def _load_tokens(of, batch, head, token, length, dims, row_stride, head_stride, token_stride, DIM: tl.constexpr):
    at = batch * row_stride + head * head_stride + token.to(tl.int64)[:, None] * token_stride + dims[None, :]
    return tl.load(of + at, mask=(token < length)[:, None] & (dims < DIM)[None, :], other=0.0)


@triton.jit
def _of_taken(taken, pair, row, queries, regions, GROUP: tl.constexpr, SELECTIONS: tl.constexpr):
    """Where the regions of each row begin, `[M, 1]`."""
    query = pair.to(tl.int64) * queries + row // GROUP
    selection = query * SELECTIONS + (row % GROUP if SELECTIONS > 1 else 0)
    return taken + selection[:, None] * regions


@triton.jit
def _of_bias(bias, batch, query, bias_row, length, HAS_BIAS: tl.constexpr):
    """Where the biases of each query begin; a number that nobody uses without them, as Triton 3.6 returns no None."""
    return bias + batch * bias_row + query.to(tl.int64) * length if HAS_BIAS else 0


@triton.jit
def _shown(x, seen, of_bias, token, HAS_BIAS: tl.constexpr, LOG2E: tl.constexpr = LOG2E):
    """Scores `x` with their biases, -inf where a row does not see a token."""
    if HAS_BIAS:
        x += tl.load(of_bias + token, mask=seen, other=0.0) * LOG2E
    return tl.where(seen, x, -float("inf"))


@triton.jit
def _seen(of_region, of_taken, token, length, row, rows, position, HAS_BIAS: tl.constexpr):
    """Which rows see which tokens, in either order: all arguments broadcast to it."""
    there = (token < length) & (row < rows)
    region = tl.load(of_region + token, mask=token < length, other=-1)
    seen = there & ((region < 0) | (tl.load(of_taken + region, mask=there & (region >= 0), other=0) > 0))
    return seen if HAS_BIAS else seen & (token <= position)
