"""The tokens of a forward, sorted: visual entries region by region, and all others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from gazepatch.config import GazeConfig
from gazepatch.layout import Span
from gazepatch.regions import ABSENT, Regions
from gazepatch.tiling import tile_span


@dataclass(frozen=True)
class Chunk:
    """The tokens of one forward, sorted into visual and other entries. `b` is 1 where all rows are alike, else B.

    Attributes:
        visual: `[b, N]` position in the chunk of each visual slot; padding of shorter rows is -1, at the end.
        other: `[b, T]` position in the chunk of every other entry; padding is -1, at the front.
        slot_windows: `[b, N]` window of each visual slot; padding counts as one window more than there are.
        regions: Tables of the regions of this chunk, slots counted from 0.
        tokens: Length of the chunk.
    """

    visual: Tensor
    other: Tensor
    slot_windows: Tensor
    regions: Regions
    tokens: int

    def to(self, device: torch.device) -> Chunk:
        """The same tables on `device`."""
        tensors = {name: getattr(self, name).to(device) for name in ("visual", "other", "slot_windows")}
        return Chunk(**tensors, regions=self.regions.to(device), tokens=self.tokens)

    def visual_entries(self, x: Tensor) -> Tensor:
        """`x` `[B, H, S, D]` of the whole chunk gives `[B, H, N, D]` in slot order."""
        return take(x, self.visual)

    def other_entries(self, x: Tensor) -> Tensor:
        """`x` `[B, H, S, D]` of the whole chunk gives `[B, H, T, D]` of all other tokens."""
        return take(x, self.other)

    def means(self, x: Tensor) -> Tensor:
        """Mean over every window: `x` `[B, H, N, D]` in slot order gives `[B, H, R * C, D]`, 0 for absent ones."""
        batch, heads, _, dim = x.shape
        total = self.regions.log_counts.shape[1]
        windows = self.slot_windows.expand(batch, -1)
        bins = torch.arange(batch * heads, device=x.device).view(batch, heads, 1) * (total + 1) + windows[:, None]
        sums = x.new_zeros(batch * heads * (total + 1), dim, dtype=torch.float32)
        sums = sums.index_add(0, bins.reshape(-1), x.reshape(-1, dim).float())
        counts = self.regions.log_counts.exp().round().clamp(min=1)
        sums = sums.view(batch, heads, total + 1, dim)[:, :, :total]
        return (sums / counts[:, None, :, None]).to(x.dtype)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Entries `index` `[b, n]` of `x` `[B, H, S, D]`; -1 gives the first, which nobody reads."""
    index = index.clamp(min=0)
    if len(index) == 1:
        return x.index_select(2, index[0])
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def sort_chunk(spans: Iterable[Span], rows: int, offset: int, tokens: int, config: GazeConfig) -> Chunk:
    """Sort a chunk of `tokens` positions, which starts at position `offset` of `rows` rows, into its stores."""
    by_row: list[list[Span]] = [[] for _ in range(rows)]
    for span in spans:
        by_row[span.row].append(span)
    first = [replace(span, row=0) for span in by_row[0]]
    if all([replace(span, row=0) for span in row] == first for row in by_row):
        by_row = by_row[:1]  # one table serves all rows
    tables = [_row_tables(row, offset, tokens, config) for row in by_row]
    counts = tuple(len(table.length) for table in tables)
    sizes = tuple(len(table.visual) for table in tables)
    columns = math.prod(config.region) // math.prod(config.window_size)
    regions = Regions(
        start=_stack([table.start for table in tables], 0),
        length=_stack([table.length for table in tables], 0),
        log_counts=_stack([table.log_counts for table in tables], ABSENT),
        stop=_stack([table.stop for table in tables], 0),
        counts=counts,
        tokens=sizes,
        max_length=max((int(table.length.max()) for table in tables if len(table.length)), default=0),
        slots=max(sizes),
    )
    slot_windows = _stack([table.slot_windows for table in tables], max(counts) * columns)
    other = [table.other for table in tables]
    return Chunk(
        visual=_stack([table.visual for table in tables], -1),
        # Aligned to the end, so that the last entries of all rows are the last tokens: crop relies on it.
        other=torch.stack([torch.nn.functional.pad(o, (max(map(len, other)) - len(o), 0), value=-1) for o in other]),
        slot_windows=slot_windows,
        regions=regions,
        tokens=tokens,
    )


class _RowTables(NamedTuple):
    visual: Tensor
    other: Tensor
    slot_windows: Tensor
    start: Tensor
    length: Tensor
    log_counts: Tensor
    stop: Tensor


def _row_tables(spans: Sequence[Span], offset: int, tokens: int, config: GazeConfig) -> _RowTables:
    tilings = {(span.grid, span.tokens): tile_span(span, config) for span in spans}
    cut = [tilings[span.grid, span.tokens] for span in spans]
    none = torch.zeros(0, dtype=torch.long)
    positions = [torch.tensor(s.positions())[c.order] - offset for s, c in zip(spans, cut, strict=True)]
    visual = torch.cat([none, *positions])
    is_other = torch.ones(tokens, dtype=torch.bool)
    is_other[visual] = False
    firsts = torch.tensor([0, *(c.windows.numel() for c in cut)]).cumsum(0)
    length = torch.cat([none, *(c.lengths for c in cut)])
    windows = torch.cat([none, *(c.windows.reshape(-1) for c in cut)])
    return _RowTables(
        visual=visual,
        other=is_other.nonzero()[:, 0],
        slot_windows=torch.cat([none, *(c.slot_windows + f for c, f in zip(cut, firsts, strict=False))]),
        start=length.cumsum(0) - length,
        length=length,
        log_counts=windows.float().log().masked_fill(windows == 0, ABSENT),
        stop=torch.cat([none, *(torch.full_like(c.lengths, s.stop) for s, c in zip(spans, cut, strict=True))]),
    )


def _stack(rows: Sequence[Tensor], fill: float) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=fill)
