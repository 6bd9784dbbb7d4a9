"""One decode step: select regions, read them and everything that is always visible. The fast path on CPU.

Axes: B batch, H query heads, H_kv key heads, G = H / H_kv, g = selections of a key head (1, or G when every query head
selects for itself), T other entries, N visual slots, R regions, C windows of a region, S selected regions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gazepatch.buffers import StableBuffers, locked
from gazepatch.config import GazeConfig
from gazepatch.ops.partial import Part, attend, combine, sink
from gazepatch.ops.pending import PendingEntry
from gazepatch.regions import Regions
from gazepatch.score_mod import ScoreMod, added, as_bias
from gazepatch.selection import region_scores, select, window_logits

#: Keys and values that a CPU core's own cache can hold for a moment.
CHUNK_BYTES = 1 << 22


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
    """What a decode step gives.

    Attributes:
        output: Attention `[B, H, 1, D_v]`.
        read: Visual entries it read, summed over rows and selections.
        selected: `[B, H_kv, g, S]`, for `DecodePlan.numbers`; None where every region was read.
    """

    output: Tensor
    read: int | Tensor
    selected: Tensor | None = None


class DecodePlan:
    """What does not change from one decode step or layer to the next: made once, then only read.

    Args:
        regions: Tables of the regions.
        config: Budget, min_visual_tokens, head_reduce and periphery are read.
        batch: B.
        heads: H.
        key_heads: H_kv.

    Attributes:
        whole: Every region is read.
        visual_entries: Visual entries there are, summed over rows and selections.
        counts_itself: Whether `decode` adds what it reads to the `total` it is given.
    """

    counts_itself = False

    def __init__(self, regions: Regions, config: GazeConfig, batch: int, heads: int, key_heads: int) -> None:
        self.regions, self.config, self.heads = regions, config, heads
        device, budgets = regions.start.device, regions.budgets(config)
        self.on_cpu = device.type == "cpu"
        selections = heads if config.head_reduce == "none" else key_heads
        self.visual_entries = selections * sum(regions.tokens) * (batch // len(regions.tokens))
        self.whole = budgets == list(regions.counts)
        self.count = max(budgets)
        # A page is what all regions are multiples of: the fewer rows index_select copies, the better. Starts and slots
        # count too, as they are still those of rows that are gone.
        self.page = math.gcd(regions.slots, *torch.cat([regions.length, regions.start]).unique().tolist())
        self.offsets = torch.arange(0, regions.max_length, self.page, device=device)
        rows = torch.arange(batch * key_heads, device=device).view(batch, key_heads, 1, 1, 1)
        self.first_page = rows * (regions.slots // self.page) + self.offsets // self.page
        self.start_page = (regions.start // self.page)[:, None, None].expand(batch, key_heads, 1, -1)
        self.absent = None if regions.even else (regions.length == 0)[:, None, None]
        self.length = None if regions.even else regions.length[:, None, None].expand(batch, key_heads, 1, -1)
        places = torch.arange(self.count, device=device)
        self.within = None
        if len(set(budgets)) > 1:
            self.within = places < torch.tensor(budgets, device=device)[:, None, None, None]
        self.padding = _padding_bias(regions)
        self._scratch: dict[int, Tensor] = {}

    def decode(
        self,
        query: Tensor,
        entries: Entries,
        score_mod: ScoreMod,
        bias: Tensor | None = None,
        total: Tensor | None = None,
        pending: PendingEntry | None = None,
    ) -> Decoded:
        """`gaze_decode` by this plan, after `pending` has joined the other entries, which have room for it.

        `total` is for plans with `counts_itself`: a `[1]` int64 tensor.
        """
        if pending is not None:
            pending.write()
        return gaze_decode(query, entries, self, score_mod, bias)

    def prepare(self, query: Tensor, value_dim: int, buffers: StableBuffers) -> None:
        """Have what steps for such queries `[..., D]` and values of `value_dim` write to, in buffers that stay."""

    @property
    def always_read(self) -> int | None:
        """Visual entries that every step reads, summed over rows and selections; None: it depends on the selection."""
        if self.whole:
            return self.visual_entries
        return self.visual_entries * self.count // self.regions.start.shape[1] if self.regions.even else None

    def read(self, store: Tensor, pages: Tensor, which: int) -> Tensor:
        """Tokens `[g, n * page, D]` of the pages `[g, n]` of a `[B, H_kv, N, D]` store.

        Memory fresh from the system costs more than the copy itself, so it is kept: `which` numbers the stores. What
        was read before is overwritten.
        """
        groups, dim = len(pages), store.shape[-1]
        source, rows = store.view(-1, self.page * dim), pages.view(-1)
        # Whoever asks for a gradient, of the query only perhaps, needs it later; a compiler finds memory by itself.
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return source.index_select(0, rows).view(groups, -1, dim)
        size = len(rows) * source.shape[1]
        scratch = self._scratch.get(which)
        if scratch is None or scratch.numel() < size or scratch.dtype != store.dtype or locked(scratch):
            scratch = self._scratch[which] = store.new_empty(size)
        out = scratch[:size].view(len(rows), -1)
        return torch.index_select(source, 0, rows, out=out).view(groups, -1, dim)

    def numbers(self, selected: Tensor) -> Tensor:
        """`[B, H_kv, g, S]` numbers of the regions that were read, -1 where a row reads fewer than others."""
        return selected if self.within is None else selected.masked_fill(~self.within, -1)

    def chunks(self, groups: int, group_bytes: int) -> int:
        """How many groups to read at a time, so that what is copied is still in the processor's cache when used."""
        if not self.on_cpu or torch.compiler.is_compiling():
            return groups
        return max(torch.get_num_threads(), CHUNK_BYTES // max(group_bytes, 1))


def gaze_decode(
    query: Tensor, entries: Entries, plan: DecodePlan, score_mod: ScoreMod, bias: Tensor | None = None
) -> Decoded:
    """Attention of one query token per row over the other entries, its selected regions and their periphery.

    Args:
        query: `[B, H, 1, D]`.
        entries: What the layer has cached, the query's own key included.
        plan: Of the regions that the entries were stored by.
        score_mod: What becomes of the dot products, with biases as `GazeState.laid` sorts them.
        bias: `[B or 1, 1, 1, T]`, added to the scores of the other entries (padding).
    """
    batch, heads, _, dim = query.shape
    key_heads = entries.key.shape[1]
    grouped = query.view(batch, key_heads, heads // key_heads, dim)
    score_mod, others = score_mod.grouped(key_heads, 1), entries.key.shape[2]
    of_others, of_visual = (None, None) if score_mod.bias is None else score_mod.bias.tensor_split([others], -1)
    parts = [attend(grouped, entries.key, entries.value, score_mod, added(bias, of_others))]
    read: int | Tensor = plan.visual_entries
    selected: Tensor | None = None
    if plan.whole:
        parts.append(
            attend(grouped, entries.visual_key, entries.visual_value, score_mod, added(plan.padding, of_visual))
        )
    else:
        logits = window_logits(grouped, entries.mean_keys, plan.regions.log_counts, score_mod)
        weights = logits.softmax(-1)
        selected = _select(weights, plan)
        part, read = _attend_selected(grouped, entries, selected, plan, score_mod, of_visual)
        parts.append(part)
        if plan.config.periphery and entries.mean_values is not None:
            parts.append(_attend_periphery(logits, weights, entries.mean_values, selected, plan))
    if score_mod.sinks is not None:
        parts.append(sink(score_mod.sinks))
    return Decoded(combine(parts).reshape(batch, heads, 1, -1), read, selected)


def _select(weights: Tensor, plan: DecodePlan) -> Tensor:
    """`[B, H_kv, g, S]` numbers of the selected regions."""
    scores = region_scores(weights, plan.regions.windows, plan.config.head_reduce)
    if plan.absent is not None:
        scores = scores.masked_fill(plan.absent, -1.0)
    return select(scores, plan.count)


def _attend_selected(
    grouped: Tensor, entries: Entries, selected: Tensor, plan: DecodePlan, score_mod: ScoreMod, of_visual: Tensor | None
) -> tuple[Part, int | Tensor]:
    batch, key_heads, group, dim = grouped.shape
    groups = batch * key_heads * selected.shape[2]  # that read the same entries
    bias: Tensor | None = None
    read: int | Tensor = selected.numel() * plan.regions.max_length
    pages = _look_up(plan.start_page, selected)[..., None] + plan.first_page
    if plan.length is not None:
        length = _look_up(plan.length, selected)
        if plan.within is not None:
            length = length * plan.within
        held = plan.offsets < length[..., None]
        # A page that a shorter region does not have is read where the store begins, and hidden.
        pages = pages.masked_fill(~held, 0)
        bias = as_bias(held).repeat_interleave(plan.page, -1).view(1, groups, 1, -1)
        read = length.sum()
    if of_visual is not None:
        own = _of_selected(of_visual, selected, plan)
        bias = added(bias, own.view(1, groups, group // selected.shape[2], -1))
    pages, query = pages.view(groups, -1), grouped.reshape(groups, -1, dim)
    size = plan.chunks(groups, 2 * pages.shape[1] * plan.page * dim * query.element_size())
    parts = []
    for some in (slice(first, first + size) for first in range(0, groups, size)):
        key = plan.read(entries.visual_key, pages[some], 0)
        # Latents are their own values: they are read once.
        alike = entries.visual_value is entries.visual_key
        value = key if alike else plan.read(entries.visual_value, pages[some], 1)
        parts.append(
            attend(query[None, some], key[None], value[None], score_mod, None if bias is None else bias[:, some])
        )
    output, lse = parts[0] if len(parts) == 1 else (torch.cat(of_all, 1) for of_all in zip(*parts, strict=True))
    return Part(output.reshape(batch, key_heads, group, -1), lse.reshape(batch, key_heads, group)), read


def _of_selected(of_visual: Tensor, selected: Tensor, plan: DecodePlan) -> Tensor:
    """`[B, H_kv, G, S * P]` biases of what is read of the selected regions, out of `[B, H_kv, G, N]` of all slots."""
    read = torch.arange(len(plan.offsets) * plan.page, device=selected.device)
    slots = (_look_up(plan.start_page, selected)[..., None] * plan.page + read).flatten(-2)
    slots = slots.clamp(max=of_visual.shape[-1] - 1).expand(-1, -1, of_visual.shape[2], -1)
    return of_visual.expand(len(slots), -1, -1, -1).gather(-1, slots)


def _look_up(table: Tensor, selected: Tensor) -> Tensor:
    """`[B, H_kv, 1, R]` table at `[B, H_kv, g, S]` regions."""
    return table.expand(*selected.shape[:3], -1).gather(-1, selected)


def _attend_periphery(logits: Tensor, weights: Tensor, mean_values: Tensor, selected: Tensor, plan: DecodePlan) -> Part:
    """One pseudo-token per window of the regions that are not selected."""
    regions = plan.regions.start.shape[1]
    taken = torch.zeros(*selected.shape[:3], regions, dtype=torch.bool, device=selected.device)
    if plan.within is None:
        taken.scatter_(-1, selected, True)
    else:
        taken.scatter_(-1, selected, plan.within.expand_as(selected))
    return periphery(unread(weights, taken), logits.logsumexp(-1), mean_values)


def unread(weights: Tensor, taken: Tensor) -> Tensor:
    """Weights of windows `[..., R * C]`, 0 for those of the regions `taken` `[..., R]`."""
    of_regions: Tensor = weights.unflatten(-1, (taken.shape[-1], -1))
    return of_regions.masked_fill(taken[..., None], 0.0).flatten(-2)


def periphery(weights: Tensor, lse: Tensor, mean_values: Tensor) -> Part:
    """Attention over pseudo-tokens.

    Args:
        weights: `[B, H_kv, Q, R * C]` their share of the softmax over all windows; 0 for windows that are read.
        total: `[B, H_kv, Q]` log-sum-exp of the logits of all windows.
        mean_values: `[B, H_kv, R * C, D_v]`.
    """
    # At least the smallest normal number, so that a periphery without weight is 0 and not 0 / 0.
    share = weights.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    output = torch.matmul(weights.div(share).to(mean_values.dtype), mean_values)
    return Part(output, lse + share.squeeze(-1).log())


def _padding_bias(regions: Regions) -> Tensor | None:
    """`[b, 1, 1, N]` that hides the visual slots of rows with fewer tokens."""
    if min(regions.tokens) == regions.slots:
        return None
    slot = torch.arange(regions.slots, device=regions.start.device)
    held = (slot >= regions.start[..., None]) & (slot < (regions.start + regions.length)[..., None])
    return as_bias(held.any(1))[:, None, None]
