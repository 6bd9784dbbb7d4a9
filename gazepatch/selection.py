"""From a query and the windows' descriptors to the regions it reads. Pure functions of tensors.

Axes: B batch, H_kv key heads, G query heads of a key head, R regions, C windows of a region, S selected regions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gazepatch.score_mod import ScoreMod


def window_logits(query: Tensor, mean_keys: Tensor, log_counts: Tensor, score_mod: ScoreMod) -> Tensor:
    """Score of the mean key + `log n` for every window: what the window weighs if its keys were all alike.

    Args:
        query: `[B, H_kv, G, D]`.
        mean_keys: `[B, H_kv, R * C, D]`.
        log_counts: `[B or 1, R * C]` float32.
        score_mod: What becomes of the dot products; grouped as the query is.

    Returns:
        `[B, H_kv, G, R * C]` float32.
    """
    products = torch.matmul(query, mean_keys.transpose(-1, -2))
    sizes = log_counts[:, None, None] if score_mod.window_bias is None else score_mod.window_bias
    return (
        torch.add(sizes, products, alpha=score_mod.scale)
        if score_mod.softcap is None
        else sizes + score_mod.of(products)
    )


def region_scores(weights: Tensor, windows: int, head_reduce: str) -> Tensor:
    """Softmax over the regions, whose logits are the log-sum-exp of their windows', agreed among the heads of a group.

    Args:
        weights: `[B, H_kv, G, R * C]` softmax over all windows, of which a region's share is the sum.
        windows: C.
        head_reduce: `mean`, `max` or `none`.

    Returns:
        `[B, H_kv, 1, R]`, or `[B, H_kv, G, R]` when every query head selects for itself.

    Source: one selection per key head, as in NSA, https://arxiv.org/abs/2502.11089.
    """
    scores = weights.unflatten(-1, (-1, windows)).sum(-1) if windows > 1 else weights
    if head_reduce == "none":
        return scores
    return scores.amax(-2, keepdim=True) if head_reduce == "max" else scores.mean(-2, keepdim=True)


def select(scores: Tensor, count: int) -> Tensor:
    """The `count` best regions; of equal ones those with the lower number, whatever the backend.

    Args:
        scores: `[..., R]`, not negative; -1 for regions that must not be selected. Compared as float32.
        count: S, at most R.

    Returns:
        `[..., S]` int64, best first.
    """
    # The bits of a positive float grow with its value. In front of the region's number they make a key without ties.
    number = torch.arange(0, -scores.shape[-1], -1, device=scores.device)
    keys = torch.add(number, scores.float().view(torch.int32).long(), alpha=1 << 32)
    return keys.topk(count, dim=-1).indices
