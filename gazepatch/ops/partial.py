"""Attention over a part of the entries, and the exact combination of several parts.

Attention over a union of disjoint sets of keys is the average of the attentions over each set, weighted by the softmax
of their log-sum-exps. So text, selected regions and periphery are read where they lie, and nothing is concatenated.

Source: the same identity as in FlashDecoding and Ring Attention, https://arxiv.org/abs/2310.01889.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gazepatch.score_mod import ScoreMod, at_least_single

# What F.scaled_dot_product_attention calls on CPU; called by name for the log-sum-exp, which it computes anyway.
_FLASH_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class Part(NamedTuple):
    """Attention over one set of keys: `output` `[B, H, Q, D]` and `lse` `[B, H, Q]`, the log-sum-exp of its scores."""

    output: Tensor
    lse: Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, score_mod: ScoreMod, bias: Tensor | None = None) -> Part:
    """Softmax attention with its log-sum-exp. Sinks are a part of their own.

    Args:
        query: `[B, H, Q, D]`.
        key: `[B, H, N, D]`.
        value: `[B, H, N, D_v]`.
        score_mod: What becomes of the dot products; its biases are those of more keys than these.
        bias: Added to the scores; broadcasts to `[B, H, Q, N]`.
    """
    tensors = (query, key, value)
    if (
        score_mod.softcap is None
        and query.device.type == "cpu"
        and query.shape[-1] == value.shape[-1]
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    ):
        # Not in float16, where ABSENT is -inf, for which the operator gives a weight of 0 (a share of 1).
        mask = None if bias is None else bias.to(at_least_single(query.dtype))
        # Autocast, which casts for all other operators, does not know this one.
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
        cast = (x.to(dtype) for x in tensors)
        dense = (x if x.stride(-1) == 1 else x.contiguous() for x in cast)  # it does not ask, and reads nonsense
        return Part(*_FLASH_CPU(*dense, 0.0, False, attn_mask=mask, scale=score_mod.scale))
    logits = score_mod.of(torch.matmul(query, key.transpose(-1, -2)))
    if bias is not None:
        logits = logits + bias
    lse = logits.logsumexp(-1)
    return Part(torch.matmul((logits - lse[..., None]).exp().to(value.dtype), value), lse)


def sink(lse: Tensor) -> Part:
    """The part of a key without a value, of score `lse` `[B or 1, H, Q]`: it takes its share, and gives nothing."""
    return Part(lse.new_zeros(1), lse)


def combine(parts: list[Part]) -> Tensor:
    """Attention over the union of disjoint sets of keys, `[B, H, Q, D]`."""
    # Rounding the shares and every step to less costs more than the precision of the parts does.
    dtype = at_least_single(parts[0].output.dtype)
    output, lse = parts[0].output.to(dtype), parts[0].lse.to(dtype)
    for i, part in enumerate(parts[1:], start=2):
        share = torch.sigmoid(part.lse - lse)[..., None]
        output = torch.lerp(output, part.output.to(dtype), share)
        if i < len(parts):
            lse = torch.logaddexp(lse, part.lse)
    return output.to(parts[0].output.dtype)
