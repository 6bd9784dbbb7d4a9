"""Text queries of a prompt that gaze: each selects its regions among the images before it. Differentiable.

In plain torch every routed query gets a row of a mask over all keys, in blocks of queries so that memory stays bounded;
a kernel needs no mask. Axes as in
`gazepatch.ops.decode`; Q are the routed queries, L the positions of the sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gazepatch.backend import choose, kernels_fit
from gazepatch.config import GazeConfig
from gazepatch.ops.decode import periphery
from gazepatch.ops.partial import Part, attend, combine, sink
from gazepatch.regions import ABSENT, Regions
from gazepatch.scores import Scores, added
from gazepatch.selection import region_scores, select, window_logits

#: Elements of the largest temporary, the mask of a block of queries.
BLOCK_ELEMENTS = 1 << 25


def gaze_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    means: tuple[Tensor, Tensor | None],
    regions: Regions,
    region_of: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    config: GazeConfig,
    scores: Scores,
) -> Tensor:
    """Gaze attention of several text queries.

    Args:
        query: `[B, H, Q, D]`.
        key, value: `[B, H_kv, L, D]`, the sequence in its own order.
        means: Mean keys and, with periphery, mean values of the windows, `[B, H_kv, R * C, D]`.
        regions: Tables of the regions.
        region_of: `[b, L]` region of every position, -1 where there is no visual token.
        positions: `[Q]` positions of the queries.
        mask: `[B or 1, 1, Q, L]`, boolean or to be added to the scores; None: causal.
        config: Settings.
        scores: What becomes of the dot products.

    Returns:
        `[B, H, Q, D_v]`.
    """
    batch, heads, queries, _ = query.shape
    length = key.shape[2]
    block = max(1, BLOCK_ELEMENTS // (batch * heads * length))
    outputs = []
    for first in range(0, queries, block):
        part = slice(first, first + block)
        bias = None if mask is None else _as_bias(mask[:, :, part])
        own = scores.of_queries(part)
        outputs.append(
            _block(query[:, :, part], key, value, means, regions, region_of, positions[part], bias, config, own)
        )
    return torch.cat(outputs, 2)


def _block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    means: tuple[Tensor, Tensor | None],
    regions: Regions,
    region_of: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    config: GazeConfig,
    scores: Scores,
) -> Tensor:
    batch, heads, queries, dim = query.shape
    key_heads, group = key.shape[1], heads // key.shape[1]
    # [B, H_kv, Q * G, D], queries first, so that the heads of a group are neighbours.
    grouped = query.view(batch, key_heads, group, queries, dim).transpose(2, 3).reshape(batch, key_heads, -1, dim)
    scores = scores.grouped(key_heads, queries)
    # A region is seen where the last token of its image is, which may be behind the query (PaliGemma).
    last = (regions.stop - 1).clamp(min=0)[:, None].expand(-1, queries, -1)
    if bias is None:  # causal
        seen = last <= positions[:, None]
    else:
        visible = (bias[:, 0] > ABSENT / 2).expand(max(len(bias), len(last)), -1, -1)
        seen = visible.gather(2, last.expand(len(visible), -1, -1))
    seen = seen & (regions.length > 0)[:, None]  # [b, Q, R]
    logits = window_logits(grouped, means[0], regions.log_counts, scores).unflatten(2, (queries, group))
    windows_seen = seen.repeat_interleave(regions.windows, -1)[:, None, :, None]
    logits = logits.masked_fill(~windows_seen, ABSENT)
    weights = logits.softmax(-1)
    taken = _taken(weights.detach(), seen, regions, config)  # [B, H_kv, Q, 1 or G, R]
    parts = [_attend_taken(grouped, key, value, region_of, taken, positions, bias, scores, config.backend)]
    if config.periphery and means[1] is not None:
        far = weights.unflatten(-1, (-1, regions.windows)).masked_fill(taken[..., None], 0.0).flatten(-2)
        parts.append(periphery(far.flatten(2, 3), logits.logsumexp(-1).flatten(2, 3), means[1]))
    if scores.sinks is not None:
        parts.append(sink(scores.sinks))
    output = combine(parts).view(batch, key_heads, queries, group, -1)
    return output.transpose(2, 3).reshape(batch, heads, queries, -1)


def _attend_taken(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region_of: Tensor,
    taken: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    scores: Scores,
    backend: str,
) -> Part:
    """Attention of `query` `[B, H_kv, Q * G, D]` over the keys that are no visual tokens and those of regions taken."""
    dtypes = {query.dtype, key.dtype, value.dtype}
    fits = scores.bias is None and kernels_fit(dtypes, query.shape[3], value.shape[3])
    if fits and choose(backend, query.device).name == "triton":
        from gazepatch.kernels.routed import routed  # imports triton

        of_queries = None if bias is None else bias[:, 0].contiguous()
        tables = region_of.int(), taken.view(torch.int8), positions.int()
        return Part(*routed(query, key, value, *tables, of_queries, scores.scale, scores.softcap))
    batch, key_heads, rows, _ = query.shape
    queries, length = len(positions), key.shape[2]
    if bias is None:
        bias = _as_bias((torch.arange(length, device=key.device) <= positions[:, None])[None, None])
    reads = taken.gather(-1, region_of.clamp(min=0)[:, None, None, None].expand(*taken.shape[:-1], -1))
    allowed = reads | (region_of < 0)[:, None, None, None]
    full = torch.where(allowed, 0.0, ABSENT) + bias[:, :, :, None]
    full = full.expand(batch, key_heads, queries, rows // queries, length).reshape(batch, key_heads, rows, length)
    return attend(query, key, value, scores, added(full.clamp(min=ABSENT), scores.bias))


def _taken(weights: Tensor, seen: Tensor, regions: Regions, config: GazeConfig) -> Tensor:
    """`[B, H_kv, Q, 1 or G, R]` whether a query reads a region."""
    scores = region_scores(weights, regions.windows, config.head_reduce).masked_fill(~seen[:, None, :, None], -1.0)
    budgets = _budgets(seen, regions, config)
    selected = select(scores, max(1, int(budgets.max())))
    within = torch.arange(selected.shape[-1], device=seen.device) < budgets[:, None, :, None, None]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, selected, within.expand_as(selected))


def _budgets(seen: Tensor, regions: Regions, config: GazeConfig) -> Tensor:
    """`[b, Q]` regions a query reads out of those it sees: `GazeConfig.budget_regions` on a tensor."""
    count = seen.sum(-1)
    if isinstance(config.budget, int):
        budget = count.clamp(max=config.budget)
    else:
        budget = torch.minimum((count.double() * config.budget - 1e-9).ceil().long().clamp(min=1), count)
    tokens = (seen * regions.length[:, None]).sum(-1)
    return torch.where(tokens < config.min_visual_tokens, count, budget)


def _as_bias(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.where(mask, 0.0, ABSENT)
    # The least number of its type hides, which in float16 is not that little.
    return mask.float().masked_fill(mask <= torch.finfo(mask.dtype).min, ABSENT).clamp(min=ABSENT)
