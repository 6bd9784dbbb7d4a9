"""Where the entries of a sequence lie that were sorted apart: visual ones region by region, all others in order."""

from __future__ import annotations

import torch
from torch import Tensor

from gazepatch.chunk import Chunk


class Order:
    """Positions of the entries in the two stores of a layer, on the CPU.

    `reach` is always how many slots the sequence has; those after `end` are others, one after the other.

    Attributes:
        visual: `[b, N]` position of each visual entry, -1 for padding.
        other: `[b, T]` position of each other entry up to `end`, -1 for padding.
        end: Slots sorted so far.
    """

    def __init__(self, chunk: Chunk, end: int) -> None:
        self.visual, self.other = _positions(chunk, end)
        self.end = end

    def extend(self, chunk: Chunk, end: int) -> None:
        """The tokens of a further chunk, up to `end`, are sorted too."""
        visual, other = _positions(chunk, end)
        self.visual = _cat_rows(self.visual, visual)
        self.other = _cat_rows(self.others(end - chunk.tokens), other)
        self.end = end

    def others(self, reach: int) -> Tensor:
        """`[b, T]` position of every other entry, -1 for padding."""
        tail = torch.arange(self.end, reach)
        return torch.cat([self.other, tail.expand(len(self.other), -1)], 1) if len(tail) else self.other

    def entries(self, reach: int) -> Tensor:
        """`[b, T + N]` position of every other entry and then of every visual one, 0 for padding."""
        return torch.cat(same_rows(self.others(reach), self.visual), 1).clamp(min=0)

    def logical(self, reach: int) -> Tensor:
        """`[b, L]` for every position, its place among the visual entries followed by the others."""
        held = torch.cat(same_rows(self.visual, self.others(reach)), 1)
        places = torch.arange(held.shape[1]).expand_as(held)
        order = torch.empty(len(held), reach + 1, dtype=torch.long)
        # Padding (-1) lands in the extra last column.
        return order.scatter_(1, torch.where(held < 0, order.shape[1] - 1, held), places)[:, :-1]

    def numbered(self, sizes: Tensor, none: int, reach: int) -> Tensor:
        """`[b, L]` for every position, which run of visual entries it is in, of these sizes `[b, n]`; else `none`."""
        number = torch.full((len(self.visual), reach + 1), none)
        for row, visual in enumerate(self.visual):  # at prefill, where each row has its own layout, or once a step
            of_row = sizes[row % len(sizes)]
            number[row, visual[visual >= 0]] = torch.arange(len(of_row)).repeat_interleave(of_row)
        return number[:, :-1]

    @property
    def last_visual(self) -> int:
        """Position of the last visual entry, -1 without any."""
        return int(self.visual.max()) if self.visual.numel() else -1

    def crop(self, reach: int) -> None:
        """Only so many slots are left, fewer than were sorted; none after them was visual."""
        self.other, self.end = self.other[:, : reach - self.end], reach

    def select_rows(self, rows: Tensor) -> None:
        """Keep the rows with these numbers, in this order."""
        self.visual, self.other = (x[rows] if len(x) > 1 else x for x in (self.visual, self.other))


def same_rows(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`[b, X]` and `[b, Y]`, both with as many rows as the one that has more: a single row stands for all."""
    rows = max(len(a), len(b))
    return a.expand(rows, -1), b.expand(rows, -1)


def _positions(chunk: Chunk, end: int) -> tuple[Tensor, Tensor]:
    """Positions of the visual and of the other tokens of a chunk that ends before `end`."""
    start = end - chunk.tokens
    visual, other = (torch.where(x < 0, -1, x + start) for x in (chunk.visual, chunk.other))
    return visual, other


def _cat_rows(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat(same_rows(a, b), 1)
