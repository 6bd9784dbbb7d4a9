"""How the grid of a span is cut into regions and windows.

The visual entries of a row are stored region by region, inside a region window by window, inside a window in raster
order. So a region is one run of slots, and a selected region is read without looking up its tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gazepatch.config import GazeConfig, Size
from gazepatch.layout import Grid, Span


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
