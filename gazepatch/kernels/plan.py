"""One decode step by the kernels: two launches, with everything they need made when the sequence gets its regions."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gazepatch.backend import DTYPES, MAX_DIM, kernels_fit
from gazepatch.buffers import StableBuffers
from gazepatch.config import GazeConfig
from gazepatch.errors import UnsupportedModelError
from gazepatch.kernels.library import watched
from gazepatch.kernels.ops import decode, decode_launch, select, select_launch
from gazepatch.kernels.repeated import Step, Steps
from gazepatch.kernels.settings import (
    architecture,
    balanced_splits,
    even_splits,
    most_splits,
    most_tiles,
    multiprocessors,
    padded_regions,
    scoring_programs,
    selecting_programs,
    tiles_of,
    tuned_for,
)
from gazepatch.ops.decode import Decoded, DecodePlan, Entries
from gazepatch.ops.pending import PendingEntry
from gazepatch.regions import Regions
from gazepatch.score_mod import ScoreMod

#: One program holds the scores of all regions of a row in its registers.
MAX_REGIONS = 8192
MAX_WINDOWS = 64  # of a region
#: Query heads of a key head: a program holds them all, in registers and shared memory.
MAX_GROUP = 32
#: Tensors of a plan that selections write.
WRITTEN = ("arrived", "runs", "weights", "tile_max_and_sum", "logits", "taken")


class WorkSplit(NamedTuple):
    """How the work of a step is shared out among programs, for queries of one kind.

    Attributes:
        scoring: Programs of the selection that a key head has.
        block: Entries of a tile.
        tiles: Tiles that the visual entries make.
        most: Most programs of the decode kernel that a selection has.
        results: As many of what such a program leaves are as large as a tile.
        partial, max_and_sum: Where these leave what they found, `[.., most, heads, D_v]` and `[.., most, heads, 2]`.
    """

    scoring: int
    block: int
    tiles: int
    most: int
    results: int
    partial: Tensor
    max_and_sum: Tensor


class KernelPlan(DecodePlan):
    """A `DecodePlan` for the kernels. What they do not take, its base does: a reason is in `unfit`."""

    def __init__(self, regions: Regions, config: GazeConfig, batch: int, heads: int, key_heads: int) -> None:
        super().__init__(regions, config, batch, heads, key_heads)
        device, group = regions.start.device, heads // key_heads
        self.counts_itself = not (self.whole or regions.even)
        self.table = torch.stack([regions.start, regions.length], -1).int()
        count, windows = regions.start.shape[1], regions.log_counts.shape[1]
        self.log_counts = regions.log_counts.float().contiguous()
        self.budget = torch.tensor(regions.budgets(config), dtype=torch.int32, device=device)
        self.pairs, self.selections = batch * key_heads, group if config.head_reduce == "none" else 1
        self.shape = (batch, key_heads, self.selections)
        self.programs = multiprocessors(device)
        self.arrived = torch.zeros(self.pairs * self.selections, dtype=torch.int32, device=device)
        self.longest = regions.max_length
        if self.whole and min(regions.tokens) == regions.slots:
            self.longest = regions.slots  # one long run
            run = torch.tensor([0, regions.slots], dtype=torch.int32, device=device)
            self.runs = run.expand(*self.shape, 1, 2).contiguous()
        elif self.whole:
            self.runs = self.table[:, None, None].expand(*self.shape, -1, -1).contiguous()
        else:
            self.runs = torch.empty(*self.shape, self.count, 2, dtype=torch.int32, device=device)
            self.weights = torch.empty(batch, heads, padded_regions(count), device=device)
            tiles = most_tiles(count, regions.windows)
            self.tile_max_and_sum = torch.empty(batch, heads, tiles, 2, device=device)
            self.logits = torch.empty(batch, heads, windows if config.periphery else 0, device=device)
            self.taken = torch.empty(*self.shape, count if config.periphery else 0, dtype=torch.int8, device=device)
        self._split_of_kind: dict[tuple[int, int, int], WorkSplit] = {}
        self._steps = Steps()

    def prepare(self, query: Tensor, value_dim: int, buffers: StableBuffers) -> None:
        """See `DecodePlan.prepare`."""

        def keep(name: Hashable, made: Tensor) -> Tensor:
            return buffers.keep((*self.shape, self.heads, name), made)

        self._steps.clear()
        for name in ("arrived",) if self.whole else WRITTEN:
            setattr(self, name, keep(name, getattr(self, name)))
        split, kind = self._split(query, value_dim), _kind(query, value_dim)
        partial, max_and_sum = keep(("partial", kind), split.partial), keep(("max_and_sum", kind), split.max_and_sum)
        self._split_of_kind[kind] = split._replace(partial=partial, max_and_sum=max_and_sum)

    def decode(
        self,
        query: Tensor,
        entries: Entries,
        score_mod: ScoreMod,
        bias: Tensor | None = None,
        total: Tensor | None = None,
        pending: PendingEntry | None = None,
    ) -> Decoded:
        """See `DecodePlan.decode`; by the kernels, where they fit."""
        step = self._step(query, entries, score_mod, bias, total, pending)
        if step is not None and (known := self._steps.like(step)) is not None:
            return Decoded(known.run(step, self._splits(query, entries))[:, :, None], self._even_read, self.runs)
        if reason := self.unfit(query, entries, score_mod, pending):
            if self.config.backend == "triton":
                raise UnsupportedModelError(f"backend='triton' {reason}: take backend='auto'")
            return super().decode(query, entries, score_mod, bias, total, pending)
        batch, heads, _, _ = query.shape
        flat = query.view(batch, heads, -1) if query.stride(-1) == 1 else query.reshape(batch, heads, -1)
        attending = self.attending(flat, entries, score_mod, bias)
        if self.whole:
            if pending is not None:
                pending.write()
            return Decoded(decode(*attending)[:, :, None], self.visual_entries)
        read: int | Tensor = self._even_read
        if total is None and not self.regions.even:
            total = read = torch.zeros(1, dtype=torch.int64, device=query.device)
        selecting = self.selecting(flat, entries, score_mod, total, pending)
        if step is not None and self._steps.wanted(step):
            output = self._launch_and_note(step, selecting, attending)
        else:
            select(*selecting)
            output = decode(*attending)
        return Decoded(output[:, :, None], read, self.runs)

    def _step(
        self,
        query: Tensor,
        entries: Entries,
        score_mod: ScoreMod,
        bias: Tensor | None,
        total: Tensor | None,
        pending: PendingEntry | None,
    ) -> Step | None:
        """A step that may be launched as the one before it was, or None."""
        counted = self.regions.even or total is not None
        if self.whole or pending is None or not counted or watched():
            return None
        return Step(query, entries, score_mod, bias, total, pending)

    def _launch_and_note(self, step: Step, selecting: tuple[Any, ...], attending: tuple[Any, ...]) -> Tensor:
        """Launch a step, and note how for those like it."""
        query = step.query
        output = query.new_empty(*query.shape[:2], step.entries.value.shape[3])
        chosen, attended = select_launch(*selecting), decode_launch(*attending, output=output)
        self._steps.note(step, chosen, attended, (chosen.run(query.device), attended.run(query.device)))
        return output

    def numbers(self, selected: Tensor) -> Tensor:
        """See `DecodePlan.numbers`; looked up by where `runs` start, which the next layer will overwrite."""
        if selected is not self.runs:
            return super().numbers(selected)
        start, length = selected.unbind(-1)
        # Regions that only other rows have start nowhere: in a column of their own.
        slots, tokens = self.table.unbind(-1)
        first = slots.masked_fill(tokens == 0, self.regions.slots).long()
        region_at = first.new_full((len(first), self.regions.slots + 1), -1)
        region_at.scatter_(1, first, torch.arange(first.shape[1], device=first.device).expand_as(first))
        found = region_at[:, None, None].expand(*self.shape, -1).gather(-1, start.long())
        return found.masked_fill(length == 0, -1)

    @property
    def _even_read(self) -> int:
        """Visual entries that a step reads where regions are even; 0 where the kernel counts them."""
        return self.pairs * self.selections * self.count * self.regions.max_length if self.regions.even else 0

    def _has_periphery(self, entries: Entries) -> bool:
        """Whether the periphery takes part."""
        return self.config.periphery and entries.mean_values is not None and not self.whole

    def selecting(
        self, query: Tensor, entries: Entries, score_mod: ScoreMod, total: Tensor | None, pending: PendingEntry | None
    ) -> tuple[Any, ...]:
        """Arguments of `select`."""
        return (
            query,
            entries.mean_keys,
            self.log_counts,
            self.table,
            self.budget,
            self.logits,
            self.weights,
            self.tile_max_and_sum,
            self.runs,
            self.taken,
            None if self.regions.even else total,
            self.arrived,
            *appended(pending),
            score_mod.scale,
            score_mod.softcap,
            self.config.head_reduce == "max",
            self._has_periphery(entries),
            self._split(query, entries.value.shape[3]).scoring,
        )

    def attending(self, query: Tensor, entries: Entries, score_mod: ScoreMod, bias: Tensor | None) -> tuple[Any, ...]:
        """Arguments of `decode`."""
        key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (entries.key, entries.value))
        split, periphery = self._split(query, entries.value.shape[3]), self._has_periphery(entries)
        return (
            query,
            key,
            value,
            None if bias is None else bias[:, 0, 0],
            entries.visual_key,
            entries.visual_value,
            self.runs,
            self.logits if periphery else None,
            self.taken if periphery else None,
            entries.mean_values if periphery else None,
            None if score_mod.sinks is None else score_mod.sinks[:, :, 0],
            split.partial,
            split.max_and_sum,
            self.arrived,
            score_mod.scale,
            score_mod.softcap,
            self.longest,
            self._splits(query, entries),
        )

    def _splits(self, query: Tensor, entries: Entries) -> int:
        """Programs of the decode kernel that a selection has."""
        split = self._split(query, entries.value.shape[3])
        tiles = split.tiles + -(-entries.key.shape[2] // split.block)
        tiles += -(-self.log_counts.shape[1] // split.block) if self._has_periphery(entries) else 0
        return even_splits(tiles, min(split.most, balanced_splits(tiles, split.results)))

    def _split(self, query: Tensor, value_dim: int) -> WorkSplit:
        """Made once, as all layers share it."""
        kind = _kind(query, value_dim)
        if kind not in self._split_of_kind:
            self._split_of_kind[kind] = self._make_split(*kind)
        return self._split_of_kind[kind]

    def _make_split(self, dim: int, value_dim: int, bytes_per_element: int) -> WorkSplit:
        device, regions = self.log_counts.device, self.regions.start.shape[1]
        most_scoring = most_splits(self.pairs, scoring_programs(regions) * self.programs)
        scoring = selecting_programs(self.regions.windows, dim, bytes_per_element, regions, most_scoring)
        tuned = tuned_for(architecture(device), max(dim, value_dim), bytes_per_element)
        tiles = tiles_of(self.runs.shape[3], self.longest, tuned.block)
        groups = self.pairs * self.selections
        most = most_splits(groups, tuned.programs * self.programs)
        heads = self.shape[0] * self.heads // groups
        results = tuned.block * (dim + value_dim) * bytes_per_element // (heads * value_dim * 4)
        empty = self.log_counts.new_empty  # float32, on the device
        partial, max_and_sum = empty(groups, most, heads, value_dim), empty(groups, most, heads, 2)
        return WorkSplit(scoring, tuned.block, tiles, most, max(results, 1), partial, max_and_sum)

    def unfit(
        self, query: Tensor, entries: Entries, score_mod: ScoreMod, pending: PendingEntry | None = None
    ) -> str | None:
        """Why the kernels cannot take this step, or None."""
        tensors = [
            query,
            *(entry for entry in entries if entry is not None),
            *(() if pending is None else pending.entry),
        ]
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*tensors, score_mod.sinks)):
            return "has no gradients of decode steps"
        if score_mod.bias is not None:
            return "takes no biases in decode steps"
        dtypes, dims = {tensor.dtype for tensor in tensors}, (query.shape[-1], entries.value.shape[-1])
        if not kernels_fit(dtypes, *dims):
            wanted = f"one type among {_names(DTYPES)}, head dims up to {MAX_DIM}"
            return f"needs {wanted}, got {_names(dtypes)}, {dims}"
        if (group := self.heads // self.shape[1]) > MAX_GROUP:
            return f"takes up to {MAX_GROUP} query heads a key head, got {group}"
        if not self.whole and self.regions.start.shape[1] > MAX_REGIONS:
            return f"selects among up to {MAX_REGIONS} regions, got {self.regions.start.shape[1]}"
        if not self.whole and self.regions.windows > MAX_WINDOWS:
            return f"scores up to {MAX_WINDOWS} windows a region, got {self.regions.windows}"
        return None


def _kind(query: Tensor, value_dim: int) -> tuple[int, int, int]:
    return query.shape[-1], value_dim, query.element_size()


def appended(pending: PendingEntry | None) -> tuple[Any, ...]:
    """Arguments of `select`: stores of keys and values, the entry for both, and the slot. What is both is a key."""
    if pending is None:
        return None, None, None, None, None, 0
    stores, entry = ((*pair, None)[:2] for pair in (pending.stores, pending.entry))
    return *stores, *entry, pending.filled, pending.offset


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
