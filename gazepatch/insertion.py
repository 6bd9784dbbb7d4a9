"""Context tokens among a forward's other tokens: which slot of the lengthened sequence holds what.

A *slot* is a place in the sequence that the decoder sees, context tokens included; a *position* is a place in the
sequence that the rest of the model sees. Plain tables of integers, made once for a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from gazepatch.layout import Span


@dataclass(frozen=True)
class Insertion:
    """A forward of S tokens a row in S' slots: M context tokens follow each image or frame.

    Rows with fewer images are padded at the front, so that the last tokens of all rows share their slots.

    Attributes:
        count: M.
        source: `[B, S']` token in each slot; for a context token the last visual token of its image; -1 for padding.
        context: `[B, S']` number of the context token in the slot, -1 elsewhere.
        image: `[B, S']` number of the image or frame that a visual or context token belongs to, -1 elsewhere.
        slots: `[B, S]` slot of each token.
    """

    count: int
    source: Tensor
    context: Tensor
    image: Tensor
    slots: Tensor

    @property
    def inserted(self) -> int:
        """Slots that hold no token of the forward."""
        return self.source.shape[1] - self.slots.shape[1]

    def moved(self, spans: Sequence[Span]) -> list[Span]:
        """The spans by slot."""
        moved = []
        for span in spans:
            start, last = self.slots[span.row, [span.start, span.stop - 1]].tolist()
            frames = 1 if span.grid is None else span.grid[0]
            moved.append(replace(span, start=start, stop=last + 1, frame_gap=self.count if frames > 1 else 0))
        return moved

    def own_image(self) -> OwnImage:
        """What context tokens see: their own image, and the context tokens before them in it."""
        columns = (self.context >= 0).any(0).nonzero()[:, 0]
        rows = self.context[:, columns] >= 0
        slot = torch.arange(self.source.shape[1])
        visible = (self.image[:, columns, None] == self.image[:, None]) & (slot <= columns[:, None])
        # Where another row has no context token, its query is not used: it may see anything, but not nothing.
        return OwnImage(columns, rows, (visible | ~rows[..., None])[:, None])

    def to(self, device: torch.device) -> Insertion:
        """The same tables on `device`."""
        return replace(self, **{name: getattr(self, name).to(device) for name in _TABLES})


_TABLES = ("source", "context", "image", "slots")


class OwnImage(NamedTuple):
    """Queries of context tokens: `columns` `[C]` of a forward, in which `rows` `[B, C]`; `visible` `[B, 1, C, S']`."""

    columns: Tensor
    rows: Tensor
    visible: Tensor


def insert(spans: Sequence[Span], rows: int, tokens: int, count: int) -> Insertion | None:
    """Put `count` context tokens after each image or frame of a forward; None where there is none.

    Args:
        spans: By row and position in the forward. Those of one image, or one frame of a video, share their tokens.
        rows: B.
        tokens: S.
        count: M.
    """
    if not spans or not count:
        return None
    images = [_images([span for span in spans if span.row == row]) for row in range(rows)]
    longest = tokens + count * max(map(len, images))
    made = [_row(of_row, tokens, count, longest) for of_row in images]
    source, context, image, slots = (torch.stack(tables) for tables in zip(*made, strict=True))
    return Insertion(count, source, context, image, slots)


def _images(spans: Sequence[Span]) -> list[list[int]]:
    """Positions of the visual tokens of every image or frame of a row, in the order of their last ones."""
    images: dict[tuple[int, int | None, int], list[int]] = {}
    for span in spans:
        positions = span.positions()
        frames = 1 if span.grid is None else span.grid[0]
        size = len(positions) // frames
        for frame in range(frames):
            images.setdefault((span.media, span.frame, frame), []).extend(positions[frame * size : (frame + 1) * size])
    return sorted(images.values(), key=lambda positions: positions[-1])


def _row(images: Sequence[Sequence[int]], tokens: int, count: int, longest: int) -> tuple[Tensor, ...]:
    """One row of `Insertion.source`, `context`, `image` and `slots`."""
    position, number = torch.arange(tokens), torch.arange(len(images))
    last = torch.tensor([positions[-1] for positions in images], dtype=torch.long)
    padding = longest - tokens - count * len(images)
    slots = padding + position + count * torch.searchsorted(last, position)
    own = slots[last][:, None] + 1 + torch.arange(count)
    source, context, image = torch.full((3, longest), -1)
    source[slots], source[own] = position, last[:, None].expand_as(own)
    context[own] = torch.arange(count).expand_as(own)
    for i, positions in enumerate(images):
        image[slots[list(positions)]] = i
    image[own] = number[:, None].expand_as(own)
    return source, context, image, slots


class Slots:
    """Where every slot of a sequence with context tokens comes from, over all its forwards.

    Attributes:
        inserted: Slots so far that hold no token, in every row.
        recorded: Slots in the tables; after them follow tokens only.
        source: `[B, recorded]` position in each slot; for a context token the last one of its image; -1 for padding.
        context: `[B, recorded]` whether the slot holds a context token.
        padded: Whether any slot is padding.
        context_tokens: Context tokens in all rows.
    """

    def __init__(self) -> None:
        self.inserted = self.recorded = self.context_tokens = 0
        self.source: Tensor | None = None
        self.context: Tensor | None = None
        self.padded = False

    def add(self, insertion: Insertion, past: int) -> None:
        """A forward that starts at slot `past` inserts context tokens."""
        source = torch.where(insertion.source < 0, -1, insertion.source + past - self.inserted)
        context = insertion.context >= 0
        if past:
            held = self.upto(past)
            source = torch.cat([held[0].expand(len(source), -1), source], 1)
            context = torch.cat([held[1].expand(len(context), -1), context], 1)
        self.source, self.context, self.recorded = source, context, source.shape[1]
        self.context_tokens = int(context.sum())
        self.inserted += insertion.inserted
        self.padded = self.padded or bool((insertion.source < 0).any())

    def upto(self, length: int, tables: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """`source` and `context` of the first `length` slots; `tables` are these two on another device."""
        source, context = tables or (self.source, self.context)
        device = None if source is None else source.device
        tail = torch.arange(self.recorded, max(length, self.recorded), device=device)[None] - self.inserted
        if source is None or context is None:
            return tail, torch.zeros_like(tail, dtype=torch.bool)
        tail = tail.expand(len(source), -1)
        context = torch.cat([context, torch.zeros_like(tail, dtype=torch.bool)], 1)
        return torch.cat([source, tail], 1)[:, :length], context[:, :length]

    def last_context(self) -> int:
        """The last slot of a context token, -1 without any."""
        return int(self.context.any(0).nonzero().max()) if self.context is not None and self.context_tokens else -1

    def crop(self, length: int) -> None:
        """Keep `length` slots, all context tokens among them."""
        if self.source is not None and self.context is not None and length < self.recorded:
            self.source, self.context, self.recorded = self.source[:, :length], self.context[:, :length], length

    def select_rows(self, rows: Tensor) -> None:
        """Keep the rows of the batch with these numbers, in this order."""
        if self.source is not None and self.context is not None:
            self.source, self.context = self.source[rows], self.context[rows]
            self.context_tokens = int(self.context.sum())
