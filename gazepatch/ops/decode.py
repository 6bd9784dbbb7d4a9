"""One decode step: select regions, read them and everything that is always visible. The fast path on CPU.

Axes: B batch, H query heads, H_kv key heads, G = H / H_kv, T other entries, N visual slots, R regions, C windows of a
region, S selected regions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gazepatch.config import GazeConfig
from gazepatch.ops.partial import Part, attend, combine
from gazepatch.regions import ABSENT, Regions
from gazepatch.selection import region_scores, select, window_logits


class Entries(NamedTuple):
    """Keys and values of one layer. Visual ones lie region by region; `mean_values` only with periphery.

    Attributes:
        key, value: `[B, H_kv, T, D]` of every token that is always visible.
        visual_key, visual_value: `[B, H_kv, N, D]`, contiguous.
        mean_keys, mean_values: `[B, H_kv, R * C, D]`.
    """

    key: Tensor
    value: Tensor
    visual_key: Tensor
    visual_value: Tensor
    mean_keys: Tensor
    mean_values: Tensor | None


class Decoded(NamedTuple):
    """Attention output `[B, H, 1, D_v]`, and the visual entries it read: of the batch, summed over selections."""

    output: Tensor
    read: int | Tensor


def gaze_decode(
    query: Tensor,
    entries: Entries,
    regions: Regions,
    config: GazeConfig,
    scale: float,
    bias: Tensor | None = None,
) -> Decoded:
    """Attention of one query token per row over the other entries, its selected regions and their periphery.

    Args:
        query: `[B, H, 1, D]`.
        entries: What the layer has cached, the query's own key included.
        regions: Tables of the regions.
        config: Budget, head_reduce and periphery are read.
        scale: Scale of the attention scores.
        bias: `[B or 1, 1, 1, T]`, added to the scores of the other entries (padding).
    """
    batch, heads, _, dim = query.shape
    key_heads = entries.key.shape[1]
    grouped = query.view(batch, key_heads, heads // key_heads, dim)
    parts = [attend(grouped, entries.key, entries.value, scale, bias)]
    budgets = regions.budgets(config)
    read: int | Tensor
    if budgets == list(regions.counts):
        parts.append(attend(grouped, entries.visual_key, entries.visual_value, scale, _padding_bias(regions)))
        read = visual_entries(batch, heads, key_heads, regions, config)
    else:
        logits = window_logits(grouped, entries.mean_keys, regions.log_counts, scale)
        selected = _select(logits, regions, budgets, config)
        part, read = _attend_selected(grouped, entries, selected, regions, budgets, scale)
        parts.append(part)
        if config.periphery and entries.mean_values is not None:
            parts.append(_attend_periphery(logits, entries.mean_values, selected, regions, budgets))
    return Decoded(combine(parts).reshape(batch, heads, 1, -1), read)


def visual_entries(batch: int, heads: int, key_heads: int, regions: Regions, config: GazeConfig) -> int:
    """Visual entries of a batch, counted once for every selection: per key head, or per query head."""
    selections = heads if config.head_reduce == "none" else key_heads
    return selections * sum(regions.tokens) * (batch // len(regions.tokens))


def _select(logits: Tensor, regions: Regions, budgets: list[int], config: GazeConfig) -> Tensor:
    """`[B, H_kv, 1 or G, S]` numbers of the selected regions."""
    scores = region_scores(logits, regions.windows, config.head_reduce)
    if not regions.even:
        scores = scores.masked_fill((regions.length == 0)[:, None, None], -1.0)
    return select(scores, max(budgets))


def _within_budget(budgets: list[int], like: Tensor) -> Tensor | None:
    """`[B or 1, 1, 1, S]` whether a row's budget reaches to that place; None when all rows have the same."""
    if len(set(budgets)) == 1:
        return None
    return torch.arange(max(budgets), device=like.device) < torch.tensor(budgets, device=like.device)[:, None, None, None]


def _attend_selected(
    grouped: Tensor, entries: Entries, selected: Tensor, regions: Regions, budgets: list[int], scale: float
) -> tuple[Part, int | Tensor]:
    batch, key_heads, group, dim = grouped.shape
    selections = selected.shape[2]
    bias, read = None, selected.numel() * regions.max_length
    offsets = torch.arange(regions.max_length, device=selected.device)
    slots = _look_up(regions.start, selected)[..., None] + offsets
    if not regions.even:
        length = _look_up(regions.length, selected)
        if (within := _within_budget(budgets, selected)) is not None:
            length = length * within
        bias = torch.where(offsets < length[..., None], 0.0, ABSENT).view(batch, key_heads * selections, 1, -1)
        slots, read = slots.clamp(max=regions.slots - 1), length.sum()
    # Whole rows of the flattened store: index_select copies them as memory, gather would go element by element.
    first = torch.arange(batch * key_heads, device=selected.device).view(batch, key_heads, 1, 1, 1) * regions.slots
    rows = (slots + first).view(-1)
    key, value = (
        x.view(-1, x.shape[-1]).index_select(0, rows).view(batch, key_heads * selections, -1, x.shape[-1])
        for x in (entries.visual_key, entries.visual_value)
    )
    part = attend(grouped.reshape(batch, key_heads * selections, group // selections, dim), key, value, scale, bias)
    return Part(part.output.reshape(batch, key_heads, group, -1), part.weight.reshape(batch, key_heads, group)), read


def _look_up(table: Tensor, selected: Tensor) -> Tensor:
    """`[b, R]` table at `[B, H_kv, g, S]` regions."""
    batch, key_heads, selections, _ = selected.shape
    return table[:, None, None].expand(batch, key_heads, selections, -1).gather(-1, selected)


def _attend_periphery(
    logits: Tensor, mean_values: Tensor, selected: Tensor, regions: Regions, budgets: list[int]
) -> Part:
    """One pseudo-token per window of the regions that are not selected. Its logit is the one it was scored by."""
    batch, key_heads, _, _ = logits.shape
    taken = torch.zeros(batch, key_heads, selected.shape[2], regions.start.shape[1], dtype=torch.bool, device=logits.device)
    within = _within_budget(budgets, selected)
    taken.scatter_(-1, selected, True if within is None else within.expand_as(selected))  # type: ignore[arg-type]
    logits = logits.unflatten(-1, (-1, regions.windows)).masked_fill(taken[..., None], ABSENT).flatten(-2)
    weight = logits.logsumexp(-1)
    return Part(torch.matmul((logits - weight[..., None]).exp().to(mean_values.dtype), mean_values), weight)


def _padding_bias(regions: Regions) -> Tensor | None:
    """`[b, 1, 1, N]` that hides the visual slots of rows with fewer tokens."""
    if min(regions.tokens) == regions.slots:
        return None
    slot = torch.arange(regions.slots, device=regions.start.device)
    held = (slot >= regions.start[..., None]) & (slot < (regions.start + regions.length)[..., None])
    return torch.where(held.any(1), 0.0, ABSENT)[:, None, None]
