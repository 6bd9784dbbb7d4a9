"""Regions and windows of small grids, drawn by hand, and the tables that are made of them."""

from __future__ import annotations

import math
from dataclasses import fields
from itertools import chain, product

import pytest
import torch
from torch import Tensor

from gazepatch.chunk import Chunk, sort_chunk, take
from gazepatch.config import GazeConfig
from gazepatch.layout import Block, Grid, Span
from gazepatch.regions import ABSENT, Regions, by_window
from gazepatch.tiling import tile, tile_span

pytestmark = pytest.mark.usefixtures("poisoned")

#: id -> grid (t, h, w), region and window (h, w, t), tokens of each window of each region, raster numbers slot by slot
TILINGS: dict[str, tuple[Grid, tuple[int, int, int], tuple[int, int, int], list[list[int]], list[int]]] = {
    "one token": ((1, 1, 1), (6, 6, 1), (3, 3, 1), [[1, 0, 0, 0]], [0]),
    "one region": ((1, 2, 3), (2, 3, 1), (2, 3, 1), [[6]], [0, 1, 2, 3, 4, 5]),
    # 0 1 | 2 3
    # 4 5 | 6 7
    "two side by side": ((1, 2, 4), (2, 2, 1), (2, 2, 1), [[4], [4]], [0, 1, 4, 5, 2, 3, 6, 7]),
    #  0 1 | 2
    #  3 4 | 5
    #  ---------
    #  6 7 | 8
    "edges": ((1, 3, 3), (2, 2, 1), (2, 2, 1), [[4], [2], [2], [1]], [0, 1, 3, 4, 2, 5, 6, 7, 8]),
    #  0  1 : 2  3 | 4
    #  5  6 : 7  8 | 9
    #  ..............
    # 10 11 :12 13 |14
    "windows at edges": (
        (1, 3, 5),
        (4, 4, 1),
        (2, 2, 1),
        [[4, 4, 2, 2], [2, 0, 1, 0]],
        [0, 1, 5, 6, 2, 3, 7, 8, 10, 11, 12, 13, 4, 9, 14],
    ),
    "rows as regions": ((1, 3, 2), (1, 6, 1), (1, 1, 1), [[1, 1, 0, 0, 0, 0]] * 3, [0, 1, 2, 3, 4, 5]),
    # frames:  0 1   4 5   8 9
    #          2 3   6 7  10 11
    "frames apart": ((3, 2, 2), (2, 2, 1), (2, 2, 1), [[4], [4], [4]], list(range(12))),
    "two frames together": ((3, 2, 2), (2, 2, 2), (2, 2, 2), [[8], [4]], list(range(12))),
    "columns through time": (
        (2, 2, 2),
        (2, 1, 2),
        (1, 1, 2),
        [[2, 2], [2, 2]],
        # The left column: its upper token in both frames, then its lower one. Then the right column.
        [0, 4, 2, 6, 1, 5, 3, 7],
    ),
    "windows of a frame in a region of two": (
        (2, 1, 3),
        (1, 2, 2),
        (1, 1, 1),
        # Of the frames 0 1 2 / 3 4 5: the first frame's windows, then the second's; the right column has no second one.
        [[1, 1, 1, 1], [1, 0, 1, 0]],
        [0, 1, 3, 4, 2, 5],
    ),
}


@pytest.mark.parametrize("case", TILINGS.values(), ids=TILINGS)
def test_tile(case: tuple[Grid, tuple[int, int, int], tuple[int, int, int], list[list[int]], list[int]]) -> None:
    grid, region, window, windows, order = case
    tiling = tile(grid, region, window)
    assert tiling.windows.tolist() == windows
    assert tiling.order.tolist() == order
    assert tiling.lengths.tolist() == [sum(of_region) for of_region in windows]
    numbered = [number for number, tokens in enumerate(chain(*windows)) for _ in range(tokens)]
    assert tiling.slot_windows.tolist() == numbered


GRIDS: list[Grid] = [(1, 1, 1), (1, 5, 7), (1, 6, 6), (1, 9, 7), (1, 10, 10), (5, 7, 3), (3, 1, 12)]
BLOCKS = [((6, 6, 1), (3, 3, 1)), ((4, 2, 2), (2, 1, 1)), ((3, 5, 4), (3, 5, 4)), ((1, 1, 1), (1, 1, 1))]


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_regions_are_neighbours(grid: Grid, blocks: tuple[tuple[int, int, int], tuple[int, int, int]]) -> None:
    tiling = tile(grid, *blocks)
    assert sorted(tiling.order.tolist()) == list(range(math.prod(grid)))
    cells = list(product(*map(range, grid)))
    in_slots = [cells[token] for token in tiling.order.tolist()]
    for block, lengths in zip(blocks, (tiling.lengths, tiling.windows.reshape(-1)), strict=True):
        size = (block[2], block[0], block[1])
        first = 0
        corners = set()
        for length in lengths.tolist():
            if not length:
                continue
            members = in_slots[first : first + length]
            corner = tuple(min(axis) for axis in zip(*members, strict=True))
            # Every cell of the grid that is less than a block away from its corner.
            ranges = [range(c, min(c + s, n)) for c, s, n in zip(corner, size, grid, strict=True)]
            assert sorted(members) == list(product(*ranges))
            assert all(c % s == 0 for c, s in zip(corner, size, strict=True))
            corners.add(corner)
            first += length
        assert first == len(cells) and len(corners) == int((lengths > 0).sum())


def test_span_without_a_grid_is_cut_into_runs() -> None:
    config = GazeConfig(region=(2, 2, 2), window=(1, 2, 1))
    tiling = tile_span(Span(0, 10, 21, None, 0), config)
    assert tiling.windows.tolist() == [[2, 2, 2, 2], [2, 1, 0, 0]]
    assert tiling.order.tolist() == list(range(11))


SMALL = GazeConfig(region=(2, 2, 1), window=(1, 2, 1), min_visual_tokens=0)


def image(grid: Grid, start: int, row: int = 0, row_gap: int = 0, media: int = 0) -> Span:
    return Block(grid, row_gap=row_gap).span(start, row, media)


def test_sort_one_row() -> None:
    # ..iiiiii.iii|iii. in a chunk that starts at position 100
    spans = [image((1, 2, 3), 102), image((1, 2, 3), 109, row_gap=1, media=1)]
    chunk = sort_chunk(spans, 1, 100, 17, SMALL)
    assert chunk.visual.tolist() == [[2, 3, 5, 6, 4, 7, 9, 10, 13, 14, 11, 15]]
    assert chunk.other.tolist() == [[0, 1, 8, 12, 16]]
    assert chunk.slot_windows.tolist() == [[0, 0, 1, 1, 2, 3, 4, 4, 5, 5, 6, 7]]
    regions = chunk.regions
    assert regions.start.tolist() == [[0, 4, 6, 10]]
    assert regions.length.tolist() == [[4, 2, 4, 2]]
    assert regions.log_counts.exp().round().tolist() == [[2, 2, 1, 1, 2, 2, 1, 1]]
    assert regions.stop.tolist() == [[108, 108, 116, 116]]
    assert (regions.counts, regions.tokens, regions.max_length, regions.slots) == ((4,), (12,), 4, 12)
    assert regions.windows == 2 and not regions.even


def test_sort_rows_of_different_counts() -> None:
    # row 0: .iiiiii..   row 1: iiii.iiii   row 2: .........
    spans = [image((1, 2, 3), 1), image((1, 2, 2), 0, row=1), image((1, 2, 2), 5, row=1, media=1)]
    chunk = sort_chunk(spans, 3, 0, 9, SMALL)
    assert chunk.visual.tolist() == [
        [1, 2, 4, 5, 3, 6, -1, -1],
        [0, 1, 2, 3, 5, 6, 7, 8],
        [-1] * 8,
    ]
    assert chunk.other.tolist() == [
        [-1, -1, -1, -1, -1, -1, 0, 7, 8],
        [-1, -1, -1, -1, -1, -1, -1, -1, 4],
        [0, 1, 2, 3, 4, 5, 6, 7, 8],
    ]
    # Four windows at most, so padding counts as number 4.
    assert chunk.slot_windows.tolist() == [[0, 0, 1, 1, 2, 3, 4, 4], [0, 0, 1, 1, 2, 2, 3, 3], [4] * 8]
    regions = chunk.regions
    assert regions.start.tolist() == [[0, 4], [0, 4], [0, 0]]
    assert regions.length.tolist() == [[4, 2], [4, 4], [0, 0]]
    assert regions.stop.tolist() == [[7, 7], [4, 9], [0, 0]]
    assert regions.log_counts[2].tolist() == pytest.approx([ABSENT] * 4)
    assert (regions.counts, regions.tokens, regions.max_length, regions.slots) == ((2, 2, 0), (6, 8, 0), 4, 8)


def test_absent_windows_of_edge_regions() -> None:
    # The second region is a column of one token, which has one of the two windows.
    regions = sort_chunk([image((1, 1, 3), 0)], 1, 0, 3, SMALL).regions
    assert regions.log_counts.tolist()[0] == pytest.approx([math.log(2), ABSENT, 0.0, ABSENT])


def test_rows_that_are_alike_share_one_table() -> None:
    spans = [image((1, 2, 2), 1, row) for row in range(3)]
    chunk = sort_chunk(spans, 3, 0, 6, SMALL)
    alone = sort_chunk(spans[:1], 1, 0, 6, SMALL)
    assert chunk.visual.tolist() == alone.visual.tolist() == [[1, 2, 3, 4]]
    assert chunk.regions.counts == (1,)


@pytest.mark.parametrize(
    "other",
    [image((1, 2, 2), 2, 1), image((1, 1, 4), 1, 1), Span(1, 1, 5, None, 0)],
    ids=["elsewhere", "another grid", "no grid"],
)
def test_rows_that_are_not_alike(other: Span) -> None:
    chunk = sort_chunk([image((1, 2, 2), 1), other], 2, 0, 6, SMALL)
    assert len(chunk.visual) == len(chunk.regions.counts) == 2
    assert chunk.visual[1].tolist() == other.positions()


def test_spans_of_rows_in_any_order() -> None:
    spans = [image((1, 2, 2), 0, 1), image((1, 2, 3), 1, 0), image((1, 2, 2), 5, 1, media=1)]
    chunk = sort_chunk(spans, 2, 0, 9, SMALL)
    assert chunk.visual.tolist() == [[1, 2, 4, 5, 3, 6, -1, -1], [0, 1, 2, 3, 5, 6, 7, 8]]


@pytest.mark.parametrize(
    ("spans", "even"),
    [
        ([image((1, 4, 4), 0)], True),
        ([image((1, 2, 4), 0), image((3, 2, 2), 8, media=1)], True),
        ([image((1, 4, 5), 0)], False),
        ([image((1, 2, 2), 0), image((1, 2, 2), 1, row=1)], True),
        ([image((1, 2, 2), 0), image((1, 2, 4), 1, row=1)], False),
        ([image((1, 2, 2), 0, row=1)], False),
    ],
    ids=["divisible", "several", "edges", "rows of one size", "rows of two sizes", "a row without"],
)
def test_even(spans: list[Span], even: bool) -> None:
    assert sort_chunk(spans, 1 + max(span.row for span in spans), 0, 24, SMALL).regions.even is even


@pytest.mark.parametrize(
    ("budget", "min_visual_tokens", "expected"),
    [(0.25, 0, [4, 2, 0]), (3, 0, [3, 3, 0]), (3, 15, [3, 3, 0]), (3, 16, [3, 6, 0]), (1.0, 0, [15, 6, 0])],
    ids=["share", "number", "just enough tokens", "few tokens", "everything"],
)
def test_budgets(budget: float | int, min_visual_tokens: int, expected: list[int]) -> None:
    spans = [image((1, 6, 9), 0), image((1, 3, 5), 1, row=1)]
    config = GazeConfig(region=(2, 2, 1), window=None, budget=budget, min_visual_tokens=min_visual_tokens)
    regions = sort_chunk(spans, 3, 0, 60, config).regions
    assert regions.counts == (15, 6, 0) and regions.tokens == (54, 15, 0)
    assert regions.budgets(config) == expected


def test_take() -> None:
    x = torch.arange(12.0).view(2, 1, 3, 2)
    assert take(x, torch.tensor([[2, 0, 0, -1]])).tolist() == [
        [[[4, 5], [0, 1], [0, 1], [0, 1]]],
        [[[10, 11], [6, 7], [6, 7], [6, 7]]],
    ]
    assert take(x, torch.tensor([[2], [-1]])).tolist() == [[[[4, 5]]], [[[6, 7]]]]


ROWS = {
    "one row": ([image((1, 5, 7), 1), image((1, 1, 1), 36, media=1)], 1),
    "alike": ([image((1, 5, 7), 3, row) for row in range(3)], 3),
    "different": ([image((1, 10, 10), 0), image((1, 6, 6), 1, 1), image((1, 9, 7), 37, 1, media=1)], 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ROWS.values(), ids=ROWS)
def test_means_are_plain_means(case: tuple[list[Span], int], dtype: torch.dtype) -> None:
    spans, rows = case
    config = GazeConfig(region=(4, 4, 1), window=(2, 2, 1))
    chunk = sort_chunk(spans, rows, 0, 101, config)
    x = torch.randn(rows, 2, 101, 5).to(dtype)
    means = chunk.means(chunk.visual_entries(x))
    assert means.dtype == dtype
    expected = torch.zeros_like(means)
    for row in range(rows):
        number = 0
        for span in (s for s in spans if s.row == row):
            tiling = tile_span(span, config)
            in_order = torch.tensor(span.positions())[tiling.order]
            for window in range(tiling.windows.numel()):
                members = in_order[tiling.slot_windows == window]
                if len(members):
                    expected[row, :, number] = x[row, :, members].float().mean(1).to(dtype)
                number += 1
    # Summed in float32 whatever the dtype: apart by the last rounding at most.
    torch.testing.assert_close(means, expected, atol=1e-6, rtol=torch.finfo(dtype).eps)


def test_means_are_differentiable() -> None:
    chunk = sort_chunk([image((1, 3, 3), 1)], 1, 0, 11, SMALL)
    x = torch.randn(1, 1, 11, 2, requires_grad=True)
    chunk.means(chunk.visual_entries(x)).sum().backward()  # type: ignore[no-untyped-call]
    # 1 2|3
    # 4 5|6
    # -----
    # 7 8|9, and windows are one row of a region: each token has its window's share.
    shares = [0, 0.5, 0.5, 1, 0.5, 0.5, 1, 0.5, 0.5, 1, 0]
    assert x.grad is not None and x.grad[0, 0, :, 0].tolist() == shares


def same_tables(actual: Regions, expected: Regions) -> None:
    for field in fields(Regions):
        a, b = getattr(actual, field.name), getattr(expected, field.name)
        assert (a.tolist(), a.dtype) == (b.tolist(), b.dtype) if isinstance(a, Tensor) else a == b, field.name


def sorted_at(spans: list[Span], rows: int, start: int, stop: int) -> Chunk:
    return sort_chunk([s for s in spans if start <= s.start < stop], rows, start, stop - start, SMALL)


@pytest.mark.parametrize("rows", [1, 3])
def test_followed_by_equals_sorting_at_once(rows: int) -> None:
    spans = [image((1, 3, 3), 1, row) for row in range(rows)] + [image((2, 2, 1), 12, row) for row in range(rows)]
    first, second = sorted_at(spans, rows, 0, 11), sorted_at(spans, rows, 11, 20)
    same_tables(first.regions.followed_by(second.regions), sorted_at(spans, rows, 0, 20).regions)


def test_followed_by_with_rows_of_different_counts() -> None:
    # First turn: two regions (4 and 2 tokens) and none; second turn: one region of 2 tokens and two of 4.
    spans = [image((1, 2, 3), 0), image((1, 1, 2), 8), image((1, 2, 4), 7, row=1)]
    both = sorted_at(spans, 2, 0, 7).regions.followed_by(sorted_at(spans, 2, 7, 16).regions)
    assert both.length.tolist() == [[4, 2, 2, 0], [0, 0, 4, 4]]
    # The second turn's slots come after the six of the first, in every row.
    assert both.start.tolist() == [[0, 4, 6, 6], [0, 0, 6, 10]]
    assert both.stop.tolist() == [[6, 6, 10, 0], [0, 0, 15, 15]]
    assert (both.counts, both.tokens, both.max_length, both.slots) == ((3, 2), (8, 8), 4, 14)
    at_once = sorted_at(spans, 2, 0, 16).regions
    for row, count in enumerate(both.counts):
        there = both.length[row] > 0
        for name in ("length", "stop"):
            assert getattr(both, name)[row][there].tolist() == getattr(at_once, name)[row, :count].tolist()
        windows = both.log_counts.view(2, 4, 2)[row][there]
        assert windows.tolist() == at_once.log_counts.view(2, -1, 2)[row, :count].tolist()


@pytest.mark.parametrize("turn", ["first", "second"])
def test_followed_by_expands_the_turn_whose_rows_are_alike(turn: str) -> None:
    alike = [image((1, 2, 2), 0, row) for row in range(2)]
    unlike = [image((1, 2, 3), 0), image((1, 2, 5), 0, row=1)]
    shared, own = (sort_chunk(spans, 2, 0, 10, SMALL).regions for spans in (alike, unlike))
    if turn == "first":
        both = shared.followed_by(own)
        assert both.length.tolist() == [[4, 4, 2, 0], [4, 4, 4, 2]]
        assert both.start.tolist() == [[0, 4, 8, 4], [0, 4, 8, 12]]
    else:
        both = own.followed_by(shared)
        assert both.length.tolist() == [[4, 2, 0, 4], [4, 4, 2, 4]]
        assert both.start.tolist() == [[0, 4, 0, 10], [0, 4, 8, 10]]
    assert both.counts == (3, 4) and both.tokens == (10, 14) and both.slots == 14


def test_select_rows() -> None:
    spans = [image((1, 2, 3), 0), image((1, 2, 2), 0, row=1), image((1, 2, 2), 5, row=1, media=1)]
    regions = sort_chunk(spans, 2, 0, 9, SMALL).regions
    picked = regions.select_rows(torch.tensor([1, 0, 1, 1]))
    assert picked.length.tolist() == [[4, 4], [4, 2], [4, 4], [4, 4]]
    assert picked.stop.tolist() == [[4, 9], [6, 6], [4, 9], [4, 9]]
    assert picked.counts == (2, 2, 2, 2) and picked.tokens == (8, 6, 8, 8)
    # The stores keep their padding, so slots stay.
    assert picked.slots == regions.slots == 8


def test_select_rows_of_a_shared_table() -> None:
    regions = sort_chunk([image((1, 2, 3), 0, row) for row in range(2)], 2, 0, 9, SMALL).regions
    same_tables(regions.select_rows(torch.tensor([1, 1, 0])), regions)


def test_only_some_regions() -> None:
    """Of a 2 x 3 image, in regions of 4 and 2 tokens, and a 2 x 2 one, which one row sees whole and another in part."""
    regions = sort_chunk([image((1, 2, 3), 0, row) for row in range(2)], 2, 0, 6, SMALL).regions
    regions = regions.followed_by(sort_chunk([image((1, 2, 2), 7, row) for row in range(2)], 2, 6, 6, SMALL).regions)
    some = regions.only(torch.tensor([[True, True, True], [False, True, False]]))
    assert some.length.tolist() == [[4, 2, 4], [0, 2, 0]] and some.start.tolist() == [[0, 4, 6]] * 2
    assert some.counts == (3, 1) and some.tokens == (10, 2) and some.slots == regions.slots == 10
    absent = (some.log_counts == ABSENT).view(2, 3, -1)
    assert torch.equal(absent[0], (regions.log_counts == ABSENT).view(3, -1))
    assert absent[1, [0, 2]].all() and torch.equal(absent[1, 1], absent[0, 1])
    assert not some.even and some.budgets(SMALL) == [SMALL.budget_regions(3), 1]
    shared = regions.only(torch.tensor([[True, False, True]]))
    assert shared.length.tolist() == [[4, 0, 4]] and shared.counts == (2,) and shared.tokens == (8,)


def test_to_moves_every_tensor() -> None:
    chunk = sort_chunk([image((1, 2, 3), 0)], 1, 0, 9, SMALL).to(torch.device("meta"))
    tensors = [getattr(owner, f.name) for owner in (chunk, chunk.regions) for f in fields(owner)]
    devices = {tensor.device.type for tensor in tensors if isinstance(tensor, Tensor)}
    assert devices == {"meta"}


def test_by_window() -> None:
    # Windows 0 and 1 of two tokens each, window 2 of none; the third token is in none.
    bias = torch.tensor([[1.0, 2.0, 9.0, -200.0, -201.0]])[None, None]
    found = by_window(bias, torch.tensor([[0, 0, 3, 1, 1]]), 3)
    assert found.shape == (1, 1, 1, 3)
    assert found[..., :2].flatten().tolist() == pytest.approx(
        [1 + math.log(1 + math.e), -200 + math.log(1 + 1 / math.e)]
    )
    assert found[..., 2] < ABSENT / 2
    alike = by_window(torch.full((2, 3, 4, 5), 0.5), torch.tensor([[0, 0, 0, 1, 2], [1, 1, 2, 2, 2]]), 2)
    torch.testing.assert_close(alike[:, 0, 0], 0.5 + torch.tensor([[3.0, 1.0], [0.0, 2.0]]).log().clamp(min=ABSENT))
