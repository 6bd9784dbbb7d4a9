"""Layouts of a handful of tokens, worked out by hand. `i` is an image token, `.` text, `|` a break token."""

from __future__ import annotations

import pytest

from gazepatch.layout import Block, Media, Skip, Span, features, lay, number_together, runs, share_out

ONE = Block((1, 2, 3))
NEWLINES = Block((1, 2, 3), row_gap=1, newlines=True)
BREAKS = Block((1, 2, 3), row_gap=1)


def tokens(sketch: str) -> list[int]:
    return [position for position, sign in enumerate(sketch) if sign == "i"]


def span(start: int, stop: int, grid: tuple[int, int, int] | None = (1, 2, 3), media: int = 0, **names: int) -> Span:
    return Span(0, start, stop, grid, media, **names)


LAYOUTS: dict[str, tuple[list[Media], str, list[Span]]] = {
    "one image": ([[ONE]], "..iiiiii.", [span(2, 8)]),
    "two images apart": ([[ONE], [ONE]], "iiiiii.iiiiii", [span(0, 6), span(7, 13, media=1)]),
    "two images adjacent": ([[ONE], [ONE]], ".iiiiiiiiiiii", [span(1, 7), span(7, 13, media=1)]),
    "newlines": ([[NEWLINES]], ".iiiiiiii.", [span(1, 8, row_gap=1)]),
    "newlines, adjacent": (
        [[NEWLINES], [NEWLINES]],
        "iiiiiiiiiiiiiiii",
        [span(0, 7, row_gap=1), span(8, 15, media=1, row_gap=1)],
    ),
    "breaks": ([[BREAKS]], ".iii|iii|.", [span(1, 8, row_gap=1)]),
    "breaks, adjacent": (
        [[BREAKS], [BREAKS]],
        "iii|iii|iii|iii|",
        [span(0, 7, row_gap=1), span(8, 15, media=1, row_gap=1)],
    ),
    "skips around": ([[Skip(1), ONE, Skip(2)], [ONE]], "iiiiiiiii.iiiiii", [span(1, 7), span(10, 16, media=1)]),
    "skip in a run of its own": ([[Skip(1), ONE]], "i.iiiiii", [span(2, 8)]),
    "tiles in one run": (
        [[Block((1, 1, 2), tile=0), Block((1, 1, 2), tile=1)]],
        "iiii",
        [span(0, 2, (1, 1, 2), tile=0), span(2, 4, (1, 1, 2), tile=1)],
    ),
    "frames apart": (
        [[Block((1, 1, 2), frame=0), Block((1, 1, 2), frame=1)]],
        "ii..ii",
        [span(0, 2, (1, 1, 2), frame=0), span(4, 6, (1, 1, 2), frame=1)],
    ),
    "video in one run": ([[Block((2, 1, 3))]], "iiiiii", [span(0, 6, (2, 1, 3))]),
    "text inside a grid": (
        [[ONE], [ONE]],
        "iii.iii.iiiiii",
        [span(0, 3, None), span(4, 7, None), span(8, 14, media=1)],
    ),
    "breaks where the runs are long": ([[BREAKS]], "iiiiii", [span(0, 6, None)]),
    "breaks of the wrong width": ([[BREAKS]], "ii|ii|ii", [span(0, 2, None), span(3, 5, None), span(6, 8, None)]),
    "a newline missing": ([[NEWLINES]], "iiii.iiii", [span(0, 4, None), span(5, 9, None)]),
    "an empty tile": ([[ONE, Block((1, 0, 4), row_gap=1, newlines=True)]], "iiiiii", [span(0, 6)]),
    "nothing": ([], "...", []),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_lay(name: str) -> None:
    media, sketch, expected = LAYOUTS[name]
    assert lay(media, tokens(sketch), row=0) == expected


@pytest.mark.parametrize("name", LAYOUTS)
def test_spans_hold_only_tokens_that_carry_features(name: str) -> None:
    media, sketch, _ = LAYOUTS[name]
    found = [position for item in lay(media, tokens(sketch), row=0) for position in item.positions()]
    assert len(found) == len(set(found)) and set(found) <= set(tokens(sketch))
    assert len(found) == sum(item.tokens for item in lay(media, tokens(sketch), row=0))


def test_row_and_first_number_are_handed_on() -> None:
    assert lay([[ONE], [ONE]], range(12), row=3, first=5) == [Span(3, 0, 6, (1, 2, 3), 5), Span(3, 6, 12, (1, 2, 3), 6)]


@pytest.mark.parametrize(
    ("block", "tokens_with_newlines", "positions"),
    [
        (ONE, 6, [4, 5, 6, 7, 8, 9]),
        (NEWLINES, 8, [4, 5, 6, 8, 9, 10]),
        (BREAKS, 6, [4, 5, 6, 8, 9, 10]),
        (Block((2, 1, 2), row_gap=2), 4, [4, 5, 8, 9]),
        (Block((1, 1, 3), row_gap=1), 3, [4, 5, 6]),
    ],
    ids=["plain", "newlines", "breaks", "two frames with gaps of two", "one row"],
)
def test_positions_leave_the_gaps_out(block: Block, tokens_with_newlines: int, positions: list[int]) -> None:
    placed = block.span(4, row=0, media=0)
    assert block.tokens == tokens_with_newlines
    assert placed.positions() == positions
    assert (placed.start, placed.stop) == (positions[0], positions[-1] + 1)
    assert placed.tokens == len(positions)


def test_a_span_without_grid_is_all_of_its_range() -> None:
    unknown = Span(0, 3, 7, None, 0)
    assert unknown.positions() == [3, 4, 5, 6] and unknown.tokens == 4


@pytest.mark.parametrize(
    ("positions", "expected"),
    [([], []), ([3], [(3, 4)]), ([0, 1, 2], [(0, 3)]), ([0, 2, 3, 7], [(0, 1), (2, 4), (7, 8)])],
    ids=["none", "one", "one run", "several"],
)
def test_runs(positions: list[int], expected: list[tuple[int, int]]) -> None:
    assert runs(positions) == expected


SIX, TWO = [ONE], [Skip(2)]


@pytest.mark.parametrize(
    ("tokens_of_rows", "expected"),
    [
        ([8, 6], [[SIX, TWO], [SIX]]),
        ([6, 8], [[SIX], [TWO, SIX]]),
        ([0, 14], [[], [SIX, TWO, SIX]]),
        ([14, 0], [[SIX, TWO, SIX], []]),
        ([7, 7], None),
        ([8], None),
        ([8, 6, 6], None),
        ([], None),
    ],
    ids=["fits", "fits too", "first empty", "last empty", "over the end of a row", "left over", "too few", "no rows"],
)
def test_share_out(tokens_of_rows: list[int], expected: list[list[Media]] | None) -> None:
    assert features([SIX, TWO, SIX]) == 14
    assert share_out([SIX, TWO, SIX], tokens_of_rows) == expected


def test_images_and_videos_are_numbered_together() -> None:
    images = [Span(0, 10, 12, None, 0), Span(0, 30, 32, None, 1), Span(1, 0, 2, None, 0)]
    video = [Span(0, 20, 22, None, 0, frame=0), Span(0, 25, 27, None, 0, frame=1)]
    ordered = number_together([images, video])
    assert [(item.row, item.start, item.media) for item in ordered] == [
        (0, 10, 0),
        (0, 20, 1),
        (0, 25, 1),
        (0, 30, 2),
        (1, 0, 0),
    ]
