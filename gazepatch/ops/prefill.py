"""Text queries of a prompt that gaze: each selects its regions among the images before it. Differentiable.

In plain torch every routed query gets a row of a mask over all keys, in blocks of queries so that memory stays bounded;
a kernel needs no mask. Axes as in `gazepatch.ops.decode`; Q are the routed queries, L the positions of the sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gazepatch.backend import choose, kernels_fit
from gazepatch.config import GazeConfig
from gazepatch.counters import QueryReads
from gazepatch.ops.decode import periphery, unread
from gazepatch.ops.partial import Part, attend, combine, sink
from gazepatch.regions import ABSENT, Regions
from gazepatch.score_mod import ScoreMod, added, as_bias
from gazepatch.selection import region_scores, select, window_logits

#: Elements of the largest temporary, the mask of a block of queries.
BLOCK_ELEMENTS = 1 << 25


class Keys(NamedTuple):
    """Keys and values of one layer in the order of the sequence. `mean_values` only with periphery.

    Attributes:
        key, value: `[B, H_kv, L, D]`.
        mean_keys, mean_values: `[B, H_kv, R * C, D]` of the windows.
        regions: Tables of the regions.
        region_of: `[b, L]` region of every position, -1 where there is no visual token.
    """

    key: Tensor
    value: Tensor
    mean_keys: Tensor
    mean_values: Tensor | None
    regions: Regions
    region_of: Tensor


class Queries(NamedTuple):
    """Text queries of a prompt.

    Attributes:
        query: `[B, H, Q, D]`.
        positions: `[Q]`.
        mask: `[B or 1, 1, Q, L]`, boolean or to be added to the scores; None: causal.
        score_mod: What becomes of the dot products.
        reads: Counts what they read; None: nobody asks.
    """

    query: Tensor
    positions: Tensor
    mask: Tensor | None
    score_mod: ScoreMod
    reads: QueryReads | None = None

    def part(self, part: slice) -> Queries:
        """Some of them."""
        mask = None if self.mask is None else self.mask[:, :, part]
        reads = None if self.reads is None else self.reads.part(part)
        return Queries(self.query[:, :, part], self.positions[part], mask, self.score_mod.of_queries(part), reads)


def gaze_prefill(queries: Queries, keys: Keys, config: GazeConfig) -> Tensor:
    """Gaze attention of several text queries, `[B, H, Q, D_v]`."""
    batch, heads, count, _ = queries.query.shape
    block = max(1, BLOCK_ELEMENTS // (batch * heads * keys.key.shape[2]))
    parts = (queries.part(slice(first, first + block)) for first in range(0, count, block))
    return torch.cat([_block(part, keys, config) for part in parts], 2)


def _block(queries: Queries, keys: Keys, config: GazeConfig) -> Tensor:
    batch, heads, count, dim = queries.query.shape
    key_heads, group, regions = keys.key.shape[1], heads // keys.key.shape[1], keys.regions
    # [B, H_kv, Q * G, D], queries first, so that the heads of a group are neighbours.
    grouped = queries.query.view(batch, key_heads, group, count, dim).transpose(2, 3)
    grouped = grouped.reshape(batch, key_heads, -1, dim)
    bias = None if queries.mask is None else as_bias(queries.mask)
    score_mod = queries.score_mod.grouped(key_heads, count)
    seen = _seen(queries.positions, bias, regions)
    logits = window_logits(grouped, keys.mean_keys, regions.log_counts, score_mod).unflatten(2, (count, group))
    windows_seen = seen.repeat_interleave(regions.windows, -1)[:, None, :, None]
    logits = logits.masked_fill(~windows_seen, ABSENT)
    weights = logits.softmax(-1)
    taken = _taken(weights.detach(), seen, regions, config)  # [B, H_kv, Q, 1 or G, R]
    if queries.reads is not None:
        queries.reads.add(taken, seen, regions.length)
    read = _attend_kernel if _fits_kernel(grouped, keys, score_mod, config.backend) else _attend_masked
    parts = [read(grouped, keys, taken, queries.positions, bias, score_mod)]
    if config.periphery and keys.mean_values is not None:
        far = unread(weights, taken).flatten(2, 3)
        parts.append(periphery(far, logits.logsumexp(-1).flatten(2, 3), keys.mean_values))
    if score_mod.sinks is not None:
        parts.append(sink(score_mod.sinks))
    output = combine(parts).view(batch, key_heads, count, group, -1)
    return output.transpose(2, 3).reshape(batch, heads, count, -1)


def _seen(positions: Tensor, bias: Tensor | None, regions: Regions) -> Tensor:
    """`[b, Q, R]` which regions a query sees: those whose image ends where it sees, which may be after it."""
    last = (regions.stop - 1).clamp(min=0)[:, None].expand(-1, len(positions), -1)
    if bias is None:  # causal
        seen = last <= positions[:, None]
    else:
        visible = (bias[:, 0] > ABSENT / 2).expand(max(len(bias), len(last)), -1, -1)
        seen = visible.gather(2, last.expand(len(visible), -1, -1))
    return seen & (regions.length > 0)[:, None]


def _fits_kernel(query: Tensor, keys: Keys, score_mod: ScoreMod, backend: str) -> bool:
    dtypes = {query.dtype, keys.key.dtype, keys.value.dtype}
    fits = score_mod.bias is None and kernels_fit(dtypes, query.shape[3], keys.value.shape[3])
    return fits and choose(backend, query.device).name == "triton"


def _attend_kernel(
    query: Tensor, keys: Keys, taken: Tensor, positions: Tensor, bias: Tensor | None, score_mod: ScoreMod
) -> Part:
    """As `_attend_masked`, of which no mask is made."""
    from gazepatch.kernels.routed import routed  # imports triton

    of_queries = None if bias is None else bias[:, 0].contiguous()
    tables = keys.region_of.int(), taken.view(torch.int8), positions.int()
    return Part(*routed(query, keys.key, keys.value, *tables, of_queries, score_mod.scale, score_mod.softcap))


def _attend_masked(
    query: Tensor, keys: Keys, taken: Tensor, positions: Tensor, bias: Tensor | None, score_mod: ScoreMod
) -> Part:
    """Attention of `query` `[B, H_kv, Q * G, D]` over the keys that are no visual tokens and those of regions taken."""
    batch, key_heads, rows, _ = query.shape
    queries, length, region_of = len(positions), keys.key.shape[2], keys.region_of
    if bias is None:
        bias = as_bias((torch.arange(length, device=query.device) <= positions[:, None])[None, None])
    reads = taken.gather(-1, region_of.clamp(min=0)[:, None, None, None].expand(*taken.shape[:-1], -1))
    allowed = reads | (region_of < 0)[:, None, None, None]
    full = as_bias(allowed) + bias[:, :, :, None]
    full = full.expand(batch, key_heads, queries, rows // queries, length).reshape(batch, key_heads, rows, length)
    return attend(query, keys.key, keys.value, score_mod, added(full.clamp(min=ABSENT), score_mod.bias))


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
