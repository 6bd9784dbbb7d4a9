"""What all layers of one gaze cache share: where the visual tokens are, and the forward that is running."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from gazepatch.caches.order import Order, same_rows
from gazepatch.caches.tables import Tables
from gazepatch.chunk import Chunk, sort_chunk
from gazepatch.config import GazeConfig
from gazepatch.counters import Counters
from gazepatch.errors import CacheError
from gazepatch.insertion import Insertion, Slots
from gazepatch.layout import Span
from gazepatch.ops.decode import DecodePlan, Entries
from gazepatch.ops.plan import plan_for
from gazepatch.regions import ABSENT, Regions, by_window
from gazepatch.score_mod import ScoreMod, as_bias

#: Tables that change with every token.
_GROWING = ("region_of", "window_of", "logical_order", "other_positions", "entry_positions")
#: Tables that change with the regions.
_OF_REGIONS = ("chunk", "regions", "readable", "sorted_others", *_GROWING)


@dataclass(frozen=True)
class PartialPrompt:
    """The part of a prompt that there is while images are still to come, as with `prefill_chunk_size`.

    Attributes:
        ids: Token ids of every row, -1 for padding.
        captured: By modality, what its images and videos were made from.
    """

    ids: list[list[int]]
    captured: dict[str, Any]


class GazeState:
    """What the layers of one cache share: the layout of the sequence so far, and the forward that is running.

    Attributes:
        owner: The patch that fills this cache.
        length: Slots filled: tokens seen, in the model's own count, and context tokens.
        slots: What the slots hold.
        spans: Visual tokens so far, by slot.
        regions: Tables of all regions so far. None while every row has fewer visual tokens than `min_visual_tokens`:
            they are then kept like text, and read by the model's own attention.
        selections: By layer that gazes, how many selections it makes, or would make of more visual tokens.
        cut: A prompt that goes on, whose images are kept like text until all of them are there; or None.
        order: Where the entries lie that are sorted into regions and others; None as long as none are.
        chunk: The running forward's tokens, when some of them become visual entries. It reaches back to the first
            token when a sequence gets enough visual tokens only now, and over the images of a prompt that was cut.
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

    def __deepcopy__(self, memo: dict[int, Any]) -> GazeState:
        made = memo[id(self)] = object.__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise CacheError(
            "the cache of a patched model cannot be pickled or saved, as it belongs to this very model: keep a "
            "copy.deepcopy of it, or fill another one from the same prompt"
        )

    def clear(self) -> None:
        """Forget the sequence."""
        self.length = self.new_tokens = 0
        self.slots = Slots()
        self.spans: list[Span] = []
        self.regions: Regions | None = None
        self.order: Order | None = None
        self.selections: dict[int, int] = {}
        self.partial_prompt: PartialPrompt | None = None
        self.chunk: Chunk | None = None
        self.running = self.decoding = self.broken = False
        self.tables = Tables()
        self._plans: dict[tuple[int, int, int, torch.device], DecodePlan] = {}

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

    def begin(
        self,
        spans: Sequence[Span],
        rows: int,
        new_tokens: int,
        insertion: Insertion | None = None,
        prompt: bool = False,
    ) -> None:
        """A forward of `new_tokens` slots in each of `rows` rows starts; one slot is a decode step but in a `prompt`.

        `spans` are its visual tokens, by slot, and those before it that were kept like text because of a cut.
        """
        self._make_way(self.tokens + new_tokens - (0 if insertion is None else insertion.inserted))
        self.check_whole()
        self.running = self.broken = True
        if insertion is not None:
            self.slots.add(insertion, self.length)
            self.tables.forget("recorded")
        self.spans += spans
        self.chunk = self._sort(spans, rows, new_tokens) if spans else None
        self.decoding = new_tokens == 1 and not prompt and self.regions is not None and self.chunk is None
        if self.chunk is not None:
            self._extend(self.chunk, new_tokens)
        self.new_tokens = new_tokens

    def _make_way(self, tokens: int) -> None:
        """A forward starts that brings the sequence to so many tokens: refuse it where there is no room."""

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

    def _sort(self, spans: Sequence[Span], rows: int, new_tokens: int) -> Chunk | None:
        first = min(self.length, *(span.start for span in spans))
        if self.regions is None:
            if self.visual_tokens < self.config.min_visual_tokens:
                return None
            spans, first = self.spans, 0
        return sort_chunk(spans, rows, first, self.length + new_tokens - first, self.config)

    def _extend(self, chunk: Chunk, new_tokens: int) -> None:
        end = self.length + new_tokens
        if self.order is None:
            self.order = Order(chunk, end)
        else:
            self.order.extend(chunk, end)
        self.regions = chunk.regions if self.regions is None else self.regions.followed_by(chunk.regions)
        self.tables.forget(*_OF_REGIONS)
        self._plans.clear()

    def count_whole(self) -> None:
        """Count a step of a sequence with few visual tokens: every layer reads them all."""
        tokens, context = sum(span.tokens for span in self.spans), self.slots.context_tokens
        for layer, selections in self.selections.items():
            self.counters.add(layer, selections * tokens, selections * tokens, selections * context)

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

    def other_positions(self) -> Tensor:
        """`Order.others` of the sequence so far."""
        return self._order.others(self.reach)

    def sorted_others(self) -> Tensor:
        """Of `other_positions`, those that were sorted: after them are others alone."""
        return self._order.other

    def entry_positions(self) -> Tensor:
        """`Order.entries` of the sequence so far."""
        return self._order.entries(self.reach)

    def logical_order(self) -> Tensor:
        """`Order.logical` of the sequence so far."""
        return self._order.logical(self.reach)

    def region_of(self) -> Tensor:
        """`[b, L]` region of every position, -1 where there is no visual token."""
        assert self.regions is not None
        return self._order.numbered(self.regions.length, -1, self.reach)

    def window_of(self) -> Tensor:
        """`[b, L]` window of every position, R * C where there is no visual token."""
        assert self.regions is not None
        sizes = self.regions.log_counts.exp().round().long()
        return self._order.numbered(sizes, sizes.shape[1], self.reach)

    @property
    def _order(self) -> Order:
        assert self.order is not None
        return self.order

    def laid(self, score_mod: ScoreMod) -> ScoreMod:
        """Scores with biases by position, `[B or 1, H, Q, L]`, as attention over this sequence takes them."""
        if score_mod.bias is None:
            return score_mod
        assert self.regions is not None
        bias, device = score_mod.bias.float(), score_mod.bias.device
        windows = by_window(bias, self.table("window_of", device), self.regions.log_counts.shape[1])
        if self.decoding:
            order = self.table("entry_positions", device)[:, None, None]
            rows = max(len(order), len(bias))
            bias = bias.expand(rows, -1, -1, -1).gather(-1, order.expand(rows, *bias.shape[1:3], -1))
        return score_mod._replace(bias=bias, window_bias=windows)

    def recorded(self) -> tuple[Tensor, Tensor]:
        """`Slots.source` and `Slots.context`."""
        assert self.slots.source is not None and self.slots.context is not None
        return self.slots.source, self.slots.context

    def every_slot(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Position of every slot, the running forward's included, and whether it holds a context token, `[B, L]`."""
        return self.slots.upto(self.length + self.new_tokens, self.table("recorded", device))

    def table(self, name: str, device: torch.device) -> Any:
        """One of the tables above, on a layer's device; made once for all layers."""

        def make() -> Any:
            source = getattr(self, name)
            return source() if callable(source) else source

        return self.tables.get(name, device, self.reach if name in _GROWING else 0, make)

    def plan(self, query: Tensor, entries: Entries) -> DecodePlan:
        """How to decode, for layers with as many heads as these; made anew only when the sequence gets new regions."""
        return self.plan_of(len(query), query.shape[1], entries.key.shape[1], query.device)

    def plan_of(self, batch: int, heads: int, key_heads: int, device: torch.device) -> DecodePlan:
        """`plan` for so many rows and heads."""
        key = batch, heads, key_heads, device
        if key not in self._plans:
            self._plans[key] = plan_for(self.table("readable", device), self.config, batch, heads, key_heads)
        return self._plans[key]

    def bias(self, mask: Tensor | None, device: torch.device) -> Tensor | None:
        """`[b, 1, 1, T]` for the scores of a decode query with the other entries, from its mask over all positions.

        Args:
            mask: `[B, 1, 1, L]`, boolean (True: visible) or to be added; or None when everything is visible.
            device: Of the layer.
        """
        if mask is None and not bool((self._order.other < 0).any()):
            return None
        positions = self._others_on(device)
        if mask is None:
            return as_bias(positions >= 0)[:, None, None]
        row, positions = same_rows(mask.to(device)[:, 0, -1], positions)
        return bias_of(row.gather(1, positions.clamp(min=0)), positions < 0)

    def _others_on(self, device: torch.device) -> Tensor:
        """`other_positions` on a device, which waits for the host only where they do more than grow by a token."""
        held: Tensor = self.table("sorted_others", device)
        if self._order.end == self.reach:
            return held
        tail = torch.arange(self._order.end, self.reach, device=device)
        return torch.cat([held, tail.expand(len(held), -1)], 1)

    # ---- changes by generation methods

    def crop(self, tokens: int) -> None:
        """Forget the last `tokens` tokens, after `check_crop`."""
        self.length -= tokens
        self.slots.crop(self.length)
        self.tables.forget("recorded")
        self.spans = [span for span in self.spans if span.stop <= self.length]
        if self.order is not None and self.length < self.order.end:
            self.order.crop(self.length)
            self.tables.forget("sorted_others")

    def check_crop(self, tokens: int) -> None:
        """Raise CacheError unless the last `tokens` tokens, none of which may be visual, can be forgotten."""
        last = max(-1 if self.order is None else self.order.last_visual, self.slots.last_context())
        if self.partial_prompt is not None:
            last = self.length - 1
        if tokens > self.length or self.length - tokens <= last:
            self.broken = self.follows
            raise CacheError(
                f"cannot crop {tokens} of {self.tokens} tokens: only text after the last image can be forgotten, "
                f"{self.length - 1 - last} tokens here. Keep a copy of the cache from before the image instead"
            )

    def select_rows(self, rows: Tensor) -> None:
        """Keep the rows of the batch with these numbers, in this order."""
        rows = rows.cpu()
        self.slots.select_rows(rows)
        if self.order is not None:
            self.order.select_rows(rows)
        if self.regions is not None:
            self.regions = self.regions.select_rows(rows)
        of_row: dict[int, list[Span]] = {}
        for span in self.spans:
            of_row.setdefault(span.row, []).append(span)
        self.spans = [replace(span, row=i) for i, row in enumerate(rows.tolist()) for span in of_row.get(row, ())]
        if self.partial_prompt is not None:
            ids = self.partial_prompt.ids
            self.partial_prompt = replace(self.partial_prompt, ids=[ids[row] for row in rows.tolist()])
        self.tables = Tables()
        self._plans.clear()


def bias_of(row: Tensor, hidden: Tensor) -> Tensor:
    """`[B, 1, 1, T]` float32 of the `row` `[B, T]` of a mask, boolean or to be added, with more that is `hidden`."""
    return as_bias(row).masked_fill(hidden, ABSENT)[:, None, None]
