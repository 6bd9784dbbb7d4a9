"""Where visual tokens sit in a sequence, as a family's processor lays them out.

An adapter describes each image or video as a list of pieces (`Block`, `Skip`), in the order of its features; `lay`
puts them on the positions of a row's media tokens, one feature a token as the model itself does, and returns `Span`s.
Everything here is plain Python on lists of integers, so that it can be tested by hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Block:
    """A `(t, h, w)` grid of visual tokens in raster order.

    Attributes:
        grid: `(t, h, w)` in decoder tokens.
        row_gap: Positions after each grid row that hold no token of the grid.
        newlines: Whether these positions hold features too, after the last row as well (LLaVA-NeXT). Otherwise they
            are text between the rows, with ids of their own (Mistral 3).
        tile, frame: Number of the piece within its image or video, where it has several.
    """

    grid: Grid
    row_gap: int = 0
    newlines: bool = False
    tile: int | None = None
    frame: int | None = None

    @property
    def tokens(self) -> int:
        """Number of features, newlines included."""
        t, h, w = self.grid
        return t * h * (w + self.row_gap * self.newlines)

    def span(self, start: int, row: int, media: int) -> Span:
        """The span of this block when its first token is at `start`."""
        t, h, w = self.grid
        stop = start + t * h * (w + self.row_gap) - self.row_gap
        return Span(row, start, stop, self.grid, media, self.tile, self.frame, self.row_gap)


@dataclass(frozen=True)
class Skip:
    """Features that belong to no grid (class tokens, trailing newlines): they stay visible to every query."""

    tokens: int


Media = Sequence[Block | Skip]  # one image or one video


@dataclass(frozen=True)
class Span:
    """The visual tokens of one image, one tile of an image, or one video (frame): the unit that regions cut up.

    Attributes:
        row: Row of the batch.
        start, stop: Half-open range of positions in that row, from the first visual token to the one after the last; in
            families whose images are keys of cross-attention, of places among these keys.
        grid: `(t, h, w)` in decoder tokens, or `None` where it cannot be known: regions are then runs of tokens.
        media: Number of the image or video within its row.
        tile, frame: Number of the tile or frame within its image or video, where it has several.
        row_gap: Positions between two grid rows that are not part of the span.
        frame_gap: Further ones between two frames: context tokens, in a sequence that has them.
    """

    row: int
    start: int
    stop: int
    grid: Grid | None
    media: int
    tile: int | None = None
    frame: int | None = None
    row_gap: int = 0
    frame_gap: int = 0

    @property
    def tokens(self) -> int:
        """Number of visual tokens."""
        if self.grid is None:
            return self.stop - self.start
        t, h, w = self.grid
        return t * h * w

    def positions(self) -> list[int]:
        """Positions of the visual tokens in the row, in raster order."""
        if self.grid is None or not (self.row_gap or self.frame_gap):
            return list(range(self.start, self.stop))
        t, h, w = self.grid
        starts = (self.start + i * (w + self.row_gap) + i // h * self.frame_gap for i in range(t * h))
        return [first + j for first in starts for j in range(w)]


def features(media: Iterable[Media]) -> int:
    """Number of features of some images or videos, hence of the tokens they fill."""
    return sum(piece.tokens for pieces in media for piece in pieces)


def runs(positions: Iterable[int]) -> list[tuple[int, int]]:
    """Half-open ranges of consecutive positions, out of ascending ones."""
    found: list[tuple[int, int]] = []
    for position in positions:
        if found and found[-1][1] == position:
            found[-1] = (found[-1][0], position + 1)
        else:
            found.append((position, position + 1))
    return found


def share_out(media: Iterable[Media], tokens_of_rows: Sequence[int]) -> list[list[Media]] | None:
    """The images or videos of every row, from those of the batch in order.

    Returns `None` unless they fill the rows exactly and none of them goes over the end of a row.
    """
    rest, shares = list(media), []
    for tokens in tokens_of_rows:
        share: list[Media] = []
        while tokens > 0 and rest:
            share.append(rest.pop(0))
            tokens -= features(share[-1:])
        if tokens:
            return None
        shares.append(share)
    return None if rest else shares


def lay(media: Iterable[Media], tokens: Sequence[int], row: int, first: int = 0) -> list[Span]:
    """Spans of the images or videos (numbered from `first`) whose features fill the positions `tokens` of a row.

    A block whose positions have another pattern than its grid asks for becomes spans without a grid, one a run.
    """
    spans: list[Span] = []
    index = 0
    for number, pieces in enumerate(media, first):
        for piece in pieces:
            filled = tokens[index : index + piece.tokens]
            index += piece.tokens
            if isinstance(piece, Block) and filled:
                spans += _fit(piece, filled, row, number)
    return spans


def number_together(spans_of_modalities: Iterable[Iterable[Span]]) -> list[Span]:
    """All spans by row and position, with the images and videos of a row numbered in that order from 0."""
    tagged = [(span, modality) for modality, spans in enumerate(spans_of_modalities) for span in spans]
    numbers: dict[int, dict[tuple[int, int], int]] = {}
    ordered = []
    for span, modality in sorted(tagged, key=lambda pair: (pair[0].row, pair[0].start)):
        of_row = numbers.setdefault(span.row, {})
        ordered.append(replace(span, media=of_row.setdefault((modality, span.media), len(of_row))))
    return ordered


def _fit(block: Block, filled: Sequence[int], row: int, media: int) -> list[Span]:
    span = block.span(filled[0], row, media)
    expected = range(span.start, span.start + block.tokens) if block.newlines else span.positions()
    if list(filled) == list(expected):
        return [span]
    return [Span(row, start, stop, None, media, block.tile, block.frame) for start, stop in runs(filled)]
