"""Where visual tokens sit in a sequence, as a family's processor lays them out.

An adapter describes each image or video as a list of pieces (`Block`, `Skip`); `place` finds them among the media tokens
of a row and returns `Span`s. Everything here is plain Python on lists of ids, so that it can be tested by hand.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Block:
    """A `(t, h, w)` grid of visual tokens in raster order, with `row_gap` other positions after each grid row.

    The gap is a newline feature inside the run (LLaVA-NeXT) or a break token of its own id (Mistral 3). `tile` and
    `frame` number the piece within its image or video.
    """

    grid: Grid
    row_gap: int = 0
    tile: int | None = None
    frame: int | None = None


@dataclass(frozen=True)
class Skip:
    """Media tokens that belong to no grid (class tokens, trailing newlines): they stay visible to every query."""

    tokens: int


Media = Sequence[Block | Skip]  # one image or one video


@dataclass(frozen=True)
class Span:
    """The visual tokens of one image, one tile of an image, or one video (frame): the unit that regions cut up.

    Attributes:
        row: Row of the batch.
        start, stop: Half-open range of positions in that row, from the first visual token to behind the last one.
        grid: `(t, h, w)` in decoder tokens, or `None` where it cannot be known: regions are then runs of tokens.
        media: Number of the image or video within its row.
        tile, frame: Number of the tile or frame within its image or video, where it has several.
        row_gap: Positions between two grid rows that are not part of the span.
    """

    row: int
    start: int
    stop: int
    grid: Grid | None
    media: int
    tile: int | None = None
    frame: int | None = None
    row_gap: int = 0

    @property
    def tokens(self) -> int:
        """Number of visual tokens."""
        if self.grid is None:
            return self.stop - self.start
        t, h, w = self.grid
        return t * h * w

    def positions(self) -> list[int]:
        """Positions of the visual tokens in the row, in raster order."""
        if self.grid is None or not self.row_gap:
            return list(range(self.start, self.stop))
        t, h, w = self.grid
        starts = (self.start + line * (w + self.row_gap) for line in range(t * h))
        return [first + j for first in starts for j in range(w)]


def runs(ids: Sequence[int], media_ids: Iterable[int]) -> list[tuple[int, int]]:
    """Half-open ranges of consecutive positions whose id is one of `media_ids`."""
    wanted, found, start = set(media_ids), [], None
    for position, token in enumerate(ids):
        if token in wanted:
            start = position if start is None else start
        elif start is not None:
            found.append((start, position))
            start = None
    if start is not None:
        found.append((start, len(ids)))
    return found


def place(
    media: Iterator[Media], found: Sequence[tuple[int, int]], row: int, first_media: int = 0
) -> list[Span] | None:
    """Lay the images (or videos) of one row over its runs of media tokens.

    Takes from `media` until the runs are used up. Returns `None` when they do not fit each other.
    """
    tokens = [position for start, stop in found for position in range(start, stop)]
    occupied, spans, index, number = set(tokens), [], 0, first_media
    while index < len(tokens):
        for piece in next(media, (Skip(len(tokens) + 1),)):  # nothing left to lay: skip beyond the end
            if isinstance(piece, Skip):
                index += piece.tokens
                continue
            if index >= len(tokens):
                return None
            span = _span(piece, tokens[index], row, number)
            if not occupied.issuperset(span.positions()):
                return None
            # The gap behind the last grid row counts only where it is a media token itself.
            index = bisect.bisect_left(tokens, span.stop + piece.row_gap)
            spans.append(span)
        number += 1
    return spans if index == len(tokens) else None


def place_runs(
    found: Sequence[tuple[int, int]], rule: Callable[[int], Sequence[Media] | None], row: int
) -> list[Span]:
    """Judge every run by its length alone; one that `rule` cannot explain becomes a span without a grid."""
    spans: list[Span] = []
    for start, stop in found:
        number = spans[-1].media + 1 if spans else 0
        placed = place(iter(rule(stop - start) or ()), [(start, stop)], row, number)
        spans += placed or [Span(row, start, stop, grid=None, media=number)]
    return spans


def _span(block: Block, start: int, row: int, media: int) -> Span:
    t, h, w = block.grid
    stop = start + t * h * (w + block.row_gap) - block.row_gap
    return Span(row, start, stop, block.grid, media, block.tile, block.frame, block.row_gap)
