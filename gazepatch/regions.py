"""From spans to regions and windows: which visual token is stored where, and what is scored and read together.

The visual entries of a row are stored region by region, inside a region window by window, inside a window in raster
order. So a region is one run of slots, and a selected region is read without looking up its tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from gazepatch.config import GazeConfig, Size
from gazepatch.layout import Grid, Span

#: Logit of what takes no part. Finite, so that a part without any entry has weight 0 and not NaN.
ABSENT = -1e30


class Tiling(NamedTuple):
    """How one grid is cut.

    Attributes:
        order: `[n]` raster index of the token in each slot.
        lengths: `[R]` tokens per region.
        windows: `[R, C]` tokens per window; 0 where an edge region has no such window.
        slot_windows: `[n]` number of the window, in `R * C`, of the token in each slot.
    """

    order: Tensor
    lengths: Tensor
    windows: Tensor
    slot_windows: Tensor


def tile(grid: Grid, region: Size, window: Size) -> Tiling:
    """Cut a `(t, h, w)` grid into regions and windows of `(h, w, t)` tokens; those at the edges are smaller."""
    sizes = [grid[1], grid[2], grid[0]]  # in the order of a block: h, w, t
    per_axis = [math.ceil(n / r) for n, r in zip(sizes, region, strict=True)]
    inner = [r // w for r, w in zip(region, window, strict=True)]
    t, h, w = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    axes = [axis.reshape(-1) for axis in (h, w, t)]
    region_id = _ravel([a // r for a, r in zip(axes, region, strict=True)], per_axis)
    window_id = _ravel([a % r // s for a, r, s in zip(axes, region, window, strict=True)], inner)
    count = math.prod(inner)
    slot_window = region_id * count + window_id
    order = torch.argsort(slot_window, stable=True)
    windows = torch.bincount(slot_window, minlength=math.prod(per_axis) * count).view(-1, count)
    return Tiling(order, windows.sum(-1), windows, slot_window[order])


def _ravel(axes: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Row-major number of a cell; the last axis of a block is time, which varies slowest."""
    (h, w, t), (n_h, n_w, _) = axes, sizes
    return (t * n_h + h) * n_w + w


def tile_span(span: Span, config: GazeConfig) -> Tiling:
    """Cut a span; one without a grid is cut into runs as long as a region has tokens."""
    return tile(*_cut(span, config))


class Cells(NamedTuple):
    """A half-open box of a span's grid, `(t, h, w)`."""

    start: Grid
    stop: Grid


def region_cells(span: Span, config: GazeConfig) -> list[Cells]:
    """What each region of a span covers, in the order of `tile_span`; a span without a grid is a single row."""
    grid, (h, w, t), _ = _cut(span, config)
    corners = itertools.product(*(range(0, n, step) for n, step in zip(grid, (t, h, w), strict=True)))
    return [Cells((i, j, k), (min(i + t, grid[0]), min(j + h, grid[1]), min(k + w, grid[2]))) for i, j, k in corners]


def _cut(span: Span, config: GazeConfig) -> tuple[Grid, Size, Size]:
    """Grid, region and window."""
    if span.grid is not None:
        return span.grid, config.region, config.window_size
    run, window = math.prod(config.region), math.prod(config.window_size)
    return (1, 1, span.tokens), (1, run, 1), (1, window, 1)


@dataclass(frozen=True)
class Regions:
    """The regions of a batch, as tables that every gazing layer shares. `b` is 1 where all rows are alike, else B.

    Attributes:
        start: `[b, R]` first slot of the region in its row's visual store.
        length: `[b, R]` its tokens; 0 for a region that only other rows have.
        log_counts: `[b, R * C]` log of the tokens of a window; `ABSENT` for a window that is not there.
        stop: `[b, R]` first position after the span that the region belongs to.
        counts: Regions of each row.
        tokens: Visual tokens of each row.
        max_length: The longest region.
        slots: Entries per row of the visual store, with the padding of rows that have fewer tokens.
    """

    start: Tensor
    length: Tensor
    log_counts: Tensor
    stop: Tensor
    counts: tuple[int, ...]
    tokens: tuple[int, ...]
    max_length: int
    slots: int

    @property
    def even(self) -> bool:
        """Every region of every row has the same number of tokens, so nothing that is read is padding."""
        return self.slots == self.start.shape[1] * self.max_length == min(self.tokens)

    @property
    def windows(self) -> int:
        """C: windows per region."""
        return self.log_counts.shape[1] // self.start.shape[1]

    def budgets(self, config: GazeConfig) -> list[int]:
        """Regions that a query of each row reads: all of them where a row has few visual tokens."""
        return [
            count if tokens < config.min_visual_tokens else config.budget_regions(count)
            for count, tokens in zip(self.counts, self.tokens, strict=True)
        ]

    def to(self, device: torch.device) -> Regions:
        """The same tables on `device`."""
        return replace(self, **{name: getattr(self, name).to(device) for name in _TABLES})

    def select_rows(self, rows: Tensor) -> Regions:
        """The tables for other rows of the batch, for beam search."""
        if len(self.counts) == 1:
            return self
        picked = rows.tolist()
        return replace(
            self,
            counts=tuple(self.counts[i] for i in picked),
            tokens=tuple(self.tokens[i] for i in picked),
            **{name: getattr(self, name)[rows.to(self.start.device)] for name in _TABLES},
        )

    def only(self, shown: Tensor) -> Regions:
        """The tables for rows that see only the regions `shown` `[b, R]`: others take no part, but keep their slots."""
        rows = self._expand(len(shown))
        length = rows.length * shown
        hidden = ~shown.repeat_interleave(self.windows, 1)
        return replace(
            rows,
            length=length,
            log_counts=rows.log_counts.masked_fill(hidden, ABSENT),
            counts=tuple(shown.sum(1).tolist()),
            tokens=tuple(length.sum(1).tolist()),
        )

    def followed_by(self, other: Regions) -> Regions:
        """These regions, then those of a later turn, whose slots come after."""
        rows = max(len(self.counts), len(other.counts))
        first, second = self._expand(rows), replace(other, start=other.start + self.slots)._expand(rows)
        return Regions(
            **{name: torch.cat([getattr(first, name), getattr(second, name)], 1) for name in _TABLES},
            counts=tuple(a + b for a, b in zip(first.counts, second.counts, strict=True)),
            tokens=tuple(a + b for a, b in zip(first.tokens, second.tokens, strict=True)),
            max_length=max(first.max_length, second.max_length),
            slots=first.slots + second.slots,
        )

    def _expand(self, rows: int) -> Regions:
        if len(self.counts) == rows:
            return self
        return replace(
            self,
            counts=self.counts * rows,
            tokens=self.tokens * rows,
            **{name: getattr(self, name).expand(rows, -1) for name in _TABLES},
        )


_TABLES = ("start", "length", "log_counts", "stop")


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


def by_window(bias: Tensor, window_of: Tensor, windows: int) -> Tensor:
    """Log-sum-exp of the biases of every window's tokens.

    Args:
        bias: `[B or 1, H, Q, L]` float32.
        window_of: `[B or 1, L]` window of every position, `windows` where there is none.
        windows: R * C.

    Returns:
        `[B, H, Q, R * C]`; about `ABSENT` for windows without tokens.
    """
    rows = max(len(bias), len(window_of))
    bias = bias.expand(rows, -1, -1, -1)
    index = window_of[:, None, None].expand_as(bias)
    shape = (*bias.shape[:3], windows + 1)
    top = bias.new_full(shape, ABSENT).scatter_reduce(-1, index, bias.detach(), "amax")
    total = bias.new_zeros(shape).scatter_add(-1, index, (bias - top.gather(-1, index)).exp())
    return (top + total.clamp(min=torch.finfo(torch.float32).tiny).log())[..., :-1]
