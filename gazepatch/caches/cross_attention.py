"""Images that are the keys of cross-attention layers, and no tokens of the sequence (Llama 3.2 Vision).

The keys of all images so far are a sequence of their own: it grows when a forward brings pixels, and no text ever
enters it. So they have a `GazeState` and cache layers of their own, and their positions are places among these keys.
What is different from images in a sequence: a mask says which of them a query sees, and where a query sees none of
them transformers lifts its mask, so that it sees all.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gazepatch.adapters.base import Adapter
from gazepatch.caches.layer import GazeLayer, Stores
from gazepatch.caches.state import GazeState
from gazepatch.caches.static import StableLayer, StaticState
from gazepatch.chunk import Chunk, sort_chunk
from gazepatch.config import GazeConfig
from gazepatch.errors import CacheError
from gazepatch.layout import Span
from gazepatch.regions import Regions
from gazepatch.score_mod import visible

#: What a compiled step says that sees other images than those its plan was made for.
OTHERS_SHOWN = (
    "a compiled step must see the images that the token before it saw, by its cross_attention_mask: run a step that "
    "sees others without torch.compile"
)


class CrossState(GazeState):
    """The state of the keys of images.

    Every image and tile that has keys has its regions, in all rows the same, also those that are only padding: `shown`
    are the ones that the last query sees.

    Attributes:
        shown: `[b, R]` which regions the last query of each row sees, on the CPU; None: all of them.
        last_row: What stands for the row of the mask that says so; None where nobody knows.
    """

    def clear(self) -> None:
        """Forget all images."""
        super().clear()
        self.shown: Tensor | None = None
        self.last_row: object | None = None

    def look(
        self,
        spans: Sequence[Span],
        rows: int,
        keys: int,
        mask: Tensor | None,
        decoding: bool,
        last_row: object | None = None,
    ) -> bool:
        """A forward starts; returns whether its last query sees other images than the last one before.

        Waits for the device, unless the `last_row` of the mask is known to be that of the forward before it.

        Args:
            spans: Of its new images, the same in each row, by place among its new keys.
            rows: Rows.
            keys: New keys of each row.
            mask: `[B, 1, Q, L]` what its queries see of all keys; None: everything.
            decoding: Whether it is one decode step.
            last_row: What stands for the last row of the mask, one object for the same numbers; None: nobody knows.
        """
        moved = [replace(span, start=span.start + self.length, stop=span.stop + self.length) for span in spans]
        self.begin([replace(span, row=row) for row in range(rows) for span in moved], rows, keys)
        self.decoding = decoding and self.regions is not None
        known = last_row is not None and last_row is self.last_row and not keys
        self.last_row = last_row
        return not known and self._show(mask)

    def _sort(self, spans: Sequence[Span], rows: int, new_tokens: int) -> Chunk:
        # However few there are: how many a query sees is known query by query.
        return sort_chunk(spans, rows, self.length, new_tokens, self.config)

    def _extend(self, chunk: Chunk, new_tokens: int) -> None:
        super()._extend(chunk, new_tokens)
        self.tables.forget("last_places")

    def _show(self, mask: Tensor | None) -> bool:
        """Note what the last query sees, and return whether that is new; waits for the device."""
        shown = None
        if mask is not None and self.regions is not None and mask.shape[-1] == self.length + self.new_tokens:
            last = mask[:, 0, -1].index_select(1, self.table("last_places", mask.device))
            shown = visible(last).cpu()
            shown = shown[:1] if bool((shown == shown[:1]).all()) else shown
            shown = None if bool(shown.all()) else shown
        if _same(shown, self.shown):
            return False
        self.shown = shown
        self.tables.forget("readable", "shown")
        self._plans.clear()
        return True

    def last_places(self) -> Tensor:
        """`[R]` for every region, the place of the last key of its image or tile: all its keys are seen, or none."""
        assert self.regions is not None
        return self.regions.stop[0] - 1

    def readable(self) -> Regions | None:
        """Tables of the regions that the last query of each row sees."""
        return self.regions if self.regions is None or self.shown is None else self.regions.only(self.shown)

    def seen_spans(self) -> list[Span]:
        """The spans that the last query of each row sees."""
        if self.shown is None:
            return self.spans
        stops = [set((self.last_places() + 1)[of_row].tolist()) for of_row in self.shown]
        return [span for span in self.spans if span.stop in stops[span.row % len(stops)]]

    def select_rows(self, rows: Tensor) -> None:
        """Keep the rows of the batch with these numbers, in this order."""
        self.last_row = None  # rows of the mask need not have changed places too
        if self.shown is not None and len(self.shown) > 1:
            self.shown = self.shown[rows.cpu()]
        super().select_rows(rows)


class CrossLayer(GazeLayer):
    """Keys and values of the images in one cross-attention layer."""

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """`[B, H_kv, L, D]` in their order; in a decode step, whose attention reads the stores, the others alone."""
        return None if self._other is None else self._read()[0]

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """`[B, H_kv, L, D]`, like `keys`."""
        return None if self._other is None else self._read()[1]

    def _read(self) -> tuple[Tensor, Tensor]:
        # Before it takes the keys of another image in, a layer is only asked whether it holds any.
        after = self._slots < self.state.length + self.state.new_tokens
        key, value = self._others() if after or (self.gazes and self.state.decoding) else self.logical()
        return key, value

    def crop(self, tokens_to_remove: int) -> None:
        """Images stay when tokens of the text are forgotten: the mask says who sees them."""


class StaticCrossState(CrossState, StaticState):
    """The keys of images in a static cache. No step brings any, so there is only to see that nothing moves."""

    def __init__(self, owner: object, config: GazeConfig) -> None:
        super().__init__(owner, config, capacity=sys.maxsize)

    @property
    def room(self) -> int:
        """Slots there are, in a step."""
        return self.length

    def _make_ready(self) -> None:
        super()._make_ready()
        for device in {query.device for query, *_ in self._expected.values()}:
            for name in ("last_places", "shown", "sorted_others"):
                self.table(name, device)

    def look_again(self, mask: Tensor | None, last_row: object | None) -> bool:
        """A step starts; returns whether it sees other images than the forward before it, like `look`.

        A compiled step, which cannot ask, must see the same: else the device raises.
        """
        if torch.compiler.is_compiling():
            self._check_shown(mask)
            return False
        known = last_row is not None and last_row is self.last_row
        self.last_row = last_row
        if known or not self._show(mask):
            return False
        self._go_on()
        return True

    def _check_shown(self, mask: Tensor | None) -> None:
        if self.regions is None:
            return
        if mask is None:
            if self.shown is not None:
                raise CacheError(OTHERS_SHOWN)
            return
        last = mask[:, 0, -1].index_select(1, self.table("last_places", mask.device))
        shown = True if self.shown is None else self.table("shown", mask.device)
        torch._assert_async((visible(last) == shown).all(), OTHERS_SHOWN)

    def bias(self, mask: Tensor | None, device: torch.device) -> Tensor | None:
        """`[b, 1, 1, T]`, as of the base."""
        # Without a mask there is nothing to hide: no row has fewer keys than another.
        return GazeState.bias(self, mask, device) if mask is not None or not self.ready else None


class StaticCrossLayer(StableLayer, CrossLayer):
    """A `CrossLayer` of a static cache."""

    def _make_room(self, start: int, new: Stores) -> None:
        super()._make_room(start, new)
        assert self._other is not None
        self._other = self._placed("other", self._other)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` `[B]`; as many as there are stay where they are."""
        super().batch_select_indices(indices)
        if self._other is not None:
            self._other = self._placed("other", self._other)
        if self._visual is not None and self._means is not None:
            self._visual, self._means = self._placed("visual", self._visual), self._placed("means", self._means)


def new_keys(adapter: Adapter, model_config: Any, arguments: Mapping[str, Any], rows: int) -> tuple[int, list[Span]]:
    """How many keys a forward brings to each row, and where the images are among them, from the decoder's arguments."""
    states = arguments.get(adapter.cross_states)
    if states is None:
        return 0, []
    keys = states.numel() // (rows * states.shape[-1])
    return keys, adapter.cross_spans(model_config, keys)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))
