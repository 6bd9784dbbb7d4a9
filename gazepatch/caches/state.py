"""What all layers of one gaze cache share: where the visual tokens are, and the forward that is running."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gazepatch.config import GazeConfig
from gazepatch.errors import CacheError
from gazepatch.insertion import Insertion, Slots
from gazepatch.layout import Span
from gazepatch.ops.decode import DecodePlan, Entries
from gazepatch.ops.plan import plan_for
from gazepatch.regions import ABSENT, Chunk, Regions, by_window, sort_chunk
from gazepatch.scores import Scores, as_bias
from gazepatch.stats import Counters

#: Tables that change with every token.
_GROWING = ("region_of", "window_of", "logical_order", "other_positions", "entry_positions")


class GazeState:
    """What the layers of one cache share: the layout of the sequence so far, and the forward that is running.

    Attributes:
        owner: The patch that fills this cache.
        length: Slots filled: tokens seen, in the model's own count, and context tokens.
        slots: What the slots hold.
        spans: Visual tokens so far, by slot.
        regions: Tables of all regions so far. None while every row has fewer visual tokens than `min_visual_tokens`:
            they are then kept like text, and read by the model's own attention.
        chunk: The running forward's tokens, when some of them become visual entries. It reaches back to the first
            token when a sequence gets enough visual tokens only now.
        running: Whether a forward of the owner is running.
        decoding: Whether the running forward is one routed decode step.
        follows: Whether the cache crops layers of other kinds before any of these, which can then refuse too late.
    """

    follows = False

    def __init__(self, owner: object, config: GazeConfig) -> None:
        self.owner = weakref.ref(owner)
        self.config = config
        self.counters = Counters()
        self.clear()

    def clear(self) -> None:
        """Forget the sequence."""
        self.length = self.new_tokens = self.other_end = 0
        self.slots = Slots()
        self.spans: list[Span] = []
        self.regions: Regions | None = None
        self.chunk: Chunk | None = None
        self.running = self.decoding = self.broken = False
        self._visual: Tensor | None = None  # [b, N] position of each visual slot, -1 for padding
        self._other: Tensor | None = None  # [b, T] position of each other entry up to `other_end`, -1 for padding
        self._devices: dict[tuple[str, torch.device], Any] = {}

    def take_settings(self, config: GazeConfig) -> None:
        """Take the settings that are in force now, unless the sequence has begun with others."""
        if self.length == 0:
            self.config = config

    # ---- one forward

    def seen(self, slots: int) -> int:
        """What a layer with so many slots says it has seen: context tokens count inside the text decoder only."""
        return slots if self.running else slots - self.slots.inserted

    @property
    def tokens(self) -> int:
        """Tokens seen before the running forward, without context tokens."""
        return self.length - self.slots.inserted

    @property
    def reach(self) -> int:
        """Slots that the tables cover: all that are filled, the running forward's included."""
        return self.length + self.new_tokens

    def begin(self, spans: Sequence[Span], rows: int, new_tokens: int, insertion: Insertion | None = None) -> None:
        """A forward of `new_tokens` slots in each of `rows` rows starts; `spans` are its visual tokens, by slot."""
        self.check_whole()
        self.running = self.broken = True
        if insertion is not None:
            self.slots.add(insertion, self.length)
            self._forget("recorded")
        self.spans += spans
        self.chunk = self._sort(spans, rows, new_tokens) if spans else None
        self.decoding = new_tokens == 1 and self.regions is not None
        if self.chunk is not None:
            self._extend(self.chunk, new_tokens)
        self.new_tokens = new_tokens

    def check_whole(self) -> None:
        """Raise CacheError if the last change failed."""
        if self.broken:
            raise CacheError(
                "the last forward or crop of this cache failed half-way and left it incomplete: start with a new one"
            )

    def finish(self, completed: bool) -> None:
        """The forward is over; one that failed leaves its layers unequal, and the cache unusable."""
        self.length += self.new_tokens
        self.new_tokens, self.chunk = 0, None
        self.running = self.decoding = False
        self.broken = not completed

    def _forget(self, name: str, device: torch.device | None = None) -> None:
        def named(key: tuple[str, torch.device]) -> bool:
            return key[0].split()[0] == name and device in (None, key[1])

        self._devices = {key: table for key, table in self._devices.items() if not named(key)}

    def _sort(self, spans: Sequence[Span], rows: int, new_tokens: int) -> Chunk | None:
        if self.regions is not None:
            return sort_chunk(spans, rows, self.length, new_tokens, self.config)
        if self.visual_tokens < self.config.min_visual_tokens:
            return None
        return sort_chunk(self.spans, rows, 0, self.length + new_tokens, self.config)

    def _extend(self, chunk: Chunk, new_tokens: int) -> None:
        start = self.length + new_tokens - chunk.tokens
        visual, other = (torch.where(x < 0, -1, x + start) for x in (chunk.visual, chunk.other))
        past = self.other_positions() if start else None
        self._visual = visual if self._visual is None else _cat_rows(self._visual, visual)
        self._other = other if past is None else _cat_rows(past, other)
        self.other_end = self.length + new_tokens
        self.regions = chunk.regions if self.regions is None else self.regions.followed_by(chunk.regions)
        for name in ("chunk", "regions", "readable", "plan", "_other", *_GROWING):
            self._forget(name)

    # ---- what the layers ask

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of the row that has most."""
        rows = [span.row for span in self.spans]
        return max((sum(s.tokens for s in self.spans if s.row == row) for row in set(rows)), default=0)

    def readable(self) -> Regions | None:
        """Tables of the regions that a decode query selects among."""
        return self.regions

    def seen_spans(self) -> list[Span]:
        """The spans of these regions."""
        return self.spans

    def other_positions(self) -> Tensor | None:
        """`[b, T]` position of every entry that is not visual, the running forward's included; None: all in order."""
        if self._other is None:
            return None
        tail = torch.arange(self.other_end, self.reach)
        return torch.cat([self._other, tail.expand(len(self._other), -1)], 1) if len(tail) else self._other

    def logical_order(self) -> Tensor:
        """`[b, L]` for every position, its place among the visual slots followed by the other entries."""
        other, visual = self.other_positions(), self._visual
        assert other is not None and visual is not None
        visual, other = same_rows(visual, other)
        held = torch.cat([visual, other], 1)
        places = torch.arange(held.shape[1]).expand_as(held)
        order = torch.empty(len(held), self.reach + 1, dtype=torch.long)
        # Padding (-1) lands in the extra last column.
        return order.scatter_(1, torch.where(held < 0, order.shape[1] - 1, held), places)[:, :-1]

    def region_of(self) -> Tensor:
        """`[b, L]` region of every position, -1 where there is no visual token."""
        assert self.regions is not None
        return self._numbers(self.regions.length, -1)

    def window_of(self) -> Tensor:
        """`[b, L]` window of every position, R * C where there is no visual token."""
        assert self.regions is not None
        sizes = self.regions.log_counts.exp().round().long()
        return self._numbers(sizes, sizes.shape[1])

    def _numbers(self, sizes: Tensor, none: int) -> Tensor:
        """`[b, L]` number of the run of slots, of these sizes `[b, n]`, that every position is in."""
        assert self._visual is not None
        visual = self._visual
        number = torch.full((len(visual), self.reach + 1), none)
        for row in range(len(visual)):  # at prefill, where each row has its own layout, or once a step
            of_row = sizes[row % len(sizes)]
            held = visual[row][visual[row] >= 0]
            number[row, held] = torch.arange(len(of_row)).repeat_interleave(of_row)
        return number[:, :-1]

    def entry_positions(self) -> Tensor:
        """`[b, T + N]` position of every other entry and then of every visual slot, 0 for padding."""
        other, visual = self.other_positions(), self._visual
        assert other is not None and visual is not None
        return torch.cat(same_rows(other, visual), 1).clamp(min=0)

    def laid(self, scores: Scores) -> Scores:
        """Scores with biases by position, `[B or 1, H, Q, L]`, as attention over this sequence takes them."""
        if scores.bias is None:
            return scores
        assert self.regions is not None
        bias, device = scores.bias.float(), scores.bias.device
        windows = by_window(bias, self.table("window_of", device), self.regions.log_counts.shape[1])
        if self.decoding:
            order = self.table("entry_positions", device)[:, None, None]
            rows = max(len(order), len(bias))
            bias = bias.expand(rows, -1, -1, -1).gather(-1, order.expand(rows, *bias.shape[1:3], -1))
        return scores._replace(bias=bias, window_bias=windows)

    def recorded(self) -> tuple[Tensor, Tensor]:
        """`Slots.source` and `Slots.context`."""
        assert self.slots.source is not None and self.slots.context is not None
        return self.slots.source, self.slots.context

    def every_slot(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Position of every slot, the running forward's included, and whether it holds a context token, `[B, L]`."""
        return self.slots.upto(self.length + self.new_tokens, self.table("recorded", device))

    def table(self, name: str, device: torch.device) -> Any:
        """One of the tables above, on a layer's device; made once for all layers."""
        key = (f"{name} {self.reach}" if name in _GROWING else name, device)
        if key not in self._devices:
            self._forget(name, device)
            source: Any = getattr(self, name)
            source = source() if callable(source) else source
            self._devices[key] = _on(source, device)
        return self._devices[key]

    def plan(self, query: Tensor, entries: Entries) -> DecodePlan:
        """How to decode, for layers with as many heads as these; made anew only when the sequence gets new regions."""
        return self.plan_of(len(query), query.shape[1], entries.key.shape[1], query.device)

    def plan_of(self, batch: int, heads: int, key_heads: int, device: torch.device) -> DecodePlan:
        """`plan` for so many rows and heads."""
        key = (f"plan {batch} {heads} {key_heads}", device)
        if key not in self._devices:
            self._devices[key] = plan_for(self.table("readable", device), self.config, batch, heads, key_heads)
        plan: DecodePlan = self._devices[key]
        return plan

    def bias(self, mask: Tensor | None, device: torch.device) -> Tensor | None:
        """`[b, 1, 1, T]` for the scores of a decode query with the other entries, from its mask over all positions.

        Args:
            mask: `[B, 1, 1, L]`, boolean (True: visible) or to be added; or None when everything is visible.
            device: Of the layer.
        """
        assert self._other is not None
        if mask is None and not bool((self._other < 0).any()):
            return None
        positions = self._others_on(device)
        if mask is None:
            return torch.where(positions < 0, ABSENT, 0.0)[:, None, None]
        row, positions = same_rows(mask.to(device)[:, 0, -1], positions)
        return bias_of(row.gather(1, positions.clamp(min=0)), positions < 0)

    def _others_on(self, device: torch.device) -> Tensor:
        """`other_positions` on a device, which waits for the host only where they do more than grow by a token."""
        held: Tensor = self.table("_other", device)
        if self.other_end == self.reach:
            return held
        tail = torch.arange(self.other_end, self.reach, device=device)
        return torch.cat([held, tail.expand(len(held), -1)], 1)

    # ---- changes by generation methods

    def crop(self, tokens: int) -> None:
        """Forget the last `tokens` tokens, after `check_crop`."""
        self.length -= tokens
        self.slots.crop(self.length)
        self._forget("recorded")
        self.spans = [span for span in self.spans if span.stop <= self.length]
        if self._other is not None and self.length < self.other_end:
            self._other, self.other_end = self._other[:, : self.length - self.other_end], self.length
            self._forget("_other")

    def check_crop(self, tokens: int) -> None:
        """Raise CacheError unless the last `tokens` tokens, none of which may be visual, can be forgotten."""
        last_visual = -1 if self._visual is None or not self._visual.numel() else int(self._visual.max())
        last = max(last_visual, self.slots.last_context())
        if tokens > self.length or self.length - tokens <= last:
            self.broken = self.follows
            raise CacheError(
                f"cannot crop {tokens} of {self.tokens} tokens: only text behind the last image can be forgotten, "
                f"{self.length - 1 - last} tokens here. Keep a copy of the cache from before the image instead"
            )

    def select_rows(self, rows: Tensor) -> None:
        """Keep the rows of the batch with these numbers, in this order."""
        rows = rows.cpu()
        self.slots.select_rows(rows)
        if self._visual is not None and len(self._visual) > 1:
            self._visual = self._visual[rows]
        if self._other is not None and len(self._other) > 1:
            self._other = self._other[rows]
        if self.regions is not None:
            self.regions = self.regions.select_rows(rows)
        of_row: dict[int, list[Span]] = {}
        for span in self.spans:
            of_row.setdefault(span.row, []).append(span)
        self.spans = [replace(span, row=i) for i, row in enumerate(rows.tolist()) for span in of_row.get(row, ())]
        self._devices.clear()


def bias_of(row: Tensor, hidden: Tensor) -> Tensor:
    """`[B, 1, 1, T]` float32 of the `row` `[B, T]` of a mask, boolean or to be added, with more that is `hidden`."""
    return as_bias(row).masked_fill(hidden, ABSENT)[:, None, None]


def _on(table: Any, device: torch.device) -> Any:
    if isinstance(table, tuple):
        return tuple(part.to(device) for part in table)
    return None if table is None else table.to(device)


def same_rows(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`[b, X]` and `[b, Y]`, both with as many rows as the one that has more: a single row stands for all."""
    rows = max(len(a), len(b))
    return a.expand(rows, -1), b.expand(rows, -1)


def _cat_rows(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat(same_rows(a, b), 1)
