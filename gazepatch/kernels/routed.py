"""Attention of the routed queries of a prompt as an operator of torch, `torch.ops.gazepatch.routed`, with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gazepatch.kernels.device.prefill import forward_kernel, key_gradient_kernel, query_gradient_kernel
from gazepatch.kernels.settings import architecture, on, prefill_settings, row_stride


@torch.library.custom_op(
    "gazepatch::routed",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor region_of, Tensor taken, Tensor positions, Tensor? bias, "
    "float scale, float? softcap) -> (Tensor, Tensor)",
)
def routed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region_of: Tensor,
    taken: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention over the keys that are no visual tokens and those of the regions taken. One launch; two backward.

    Args:
        query: `[B, H_kv, Q * G, D]`, the heads of a query next to each other.
        key, value: `[B, H_kv, L, D]` and `[B, H_kv, L, D_v]`, the sequence in its own order.
        region_of: `[b, L]` int32 region of every position, -1 where there is no visual token; `b` is 1 or B.
        taken: `[B, H_kv, Q, g, R]` int8, g being 1 or G.
        positions: `[Q]` int32: without a bias, a query sees the keys up to its own position.
        bias: `[b, Q, L]` float32, added to the scores; or None.
        scale, softcap: Of the attention scores, as in `gazepatch.score_mod`.

    Returns:
        `[B, H_kv, Q * G, D_v]`, and `[B, H_kv, Q * G]` float32, the log-sum-exp of the scores.
    """
    query, key, value = query.contiguous(), _dense(key), _dense(value)
    batch, key_heads, rows, _ = query.shape
    output = query.new_empty(batch, key_heads, rows, value.shape[3])
    lse = query.new_empty(batch, key_heads, rows, dtype=torch.float32)
    tensors = (query, key, value, region_of, taken.contiguous(), positions, bias)
    settings = _settings(query, value)
    with on(query.device):
        grid = (-(-rows // settings["BLOCK_M"]), batch * key_heads)
        shapes, constants = _shapes(*tensors, scale, softcap), _constants(*tensors, softcap)
        forward_kernel[grid](*tensors, output, lse, *shapes, **constants, **settings)
    return output, lse


@routed.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    return query.new_empty(*query.shape[:3], value.shape[3]), lse


@torch.library.custom_op(
    "gazepatch::routed_backward",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor region_of, Tensor taken, Tensor positions, Tensor? bias, "
    "Tensor lse, Tensor d_output, Tensor delta, float scale, float? softcap) -> (Tensor, Tensor, Tensor)",
)
def routed_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region_of: Tensor,
    taken: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    d_output: Tensor,
    delta: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the query, the keys and the values, from that of the output and `delta`."""
    query, key, value = query.contiguous(), _dense(key), _dense(value)
    batch, key_heads, rows, _ = query.shape
    d_query, d_key, d_value = (x.new_empty(x.shape) for x in (query, key, value))
    tensors = (query, key, value, region_of, taken.contiguous(), positions, bias)
    given = (lse, d_output.contiguous(), delta)
    settings = _settings(query, value)
    shapes, constants = _shapes(*tensors, scale, softcap), _constants(*tensors, softcap)
    with on(query.device):
        grid = (-(-rows // settings["BLOCK_M"]), batch * key_heads)
        query_gradient_kernel[grid](*tensors, *given, d_query, *shapes, **constants, **settings)
        grid = (-(-key.shape[2] // settings["BLOCK_N"]), batch * key_heads)
        key_gradient_kernel[grid](*tensors, *given, d_key, d_value, *shapes, **constants, **settings)
    return d_query, d_key, d_value


@routed_backward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.softcap = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, d_output: Tensor, d_lse: Tensor) -> tuple[Any, ...]:
    *tensors, output, lse = ctx.saved_tensors
    # Scores s with shares p: ds = p * (dp - sum(p * dp)) from the output, and p * dw from the log-sum-exp.
    delta = (output.float() * d_output.float()).sum(-1) - d_lse
    gradients = routed_backward(*tensors, lse, d_output, delta, ctx.scale, ctx.softcap)
    return *gradients, None, None, None, None, None, None


torch.library.register_autograd("gazepatch::routed", _backward, setup_context=_save)


def _settings(query: Tensor, value: Tensor) -> dict[str, int]:
    return prefill_settings(architecture(query.device), query.shape[3], value.shape[3], query.element_size())


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region_of: Tensor,
    taken: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[float, ...]:
    _, key_heads, rows, _ = query.shape
    sizes = (key_heads, rows, len(positions), key.shape[2], taken.shape[4])
    strides = (*key.stride()[:3], *value.stride()[:3])
    rows_apart = row_stride(region_of), 0 if bias is None else row_stride(bias)
    return scale, 1.0 if softcap is None else softcap, *sizes, *strides, *rows_apart


def _constants(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region_of: Tensor,
    taken: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    softcap: float | None,
) -> dict[str, Any]:
    return {
        "GROUP": query.shape[2] // len(positions),
        "SELECTIONS": taken.shape[3],
        "DIM": query.shape[3],
        "VALUE_DIM": value.shape[3],
        "HAS_BIAS": bias is not None,
        "CAPPED": softcap is not None,
    }
