"""Images that are the keys of cross-attention layers, and no tokens of the sequence (Llama 3.2 Vision).

The keys of all images so far are a sequence of their own: it grows when a forward brings pixels, and no text ever
enters it. So they have a `GazeState` and cache layers of their own, and their positions are places among these keys.
What is different from images in a sequence: a mask says which of them a query sees, and where a query sees none of
them transformers lifts its mask, so that it sees all.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from gazepatch.adapters.base import Adapter
from gazepatch.caches.layer import GazeLayer
from gazepatch.caches.state import GazeState
from gazepatch.config import GazeConfig
from gazepatch.errors import CacheError
from gazepatch.layout import Span
from gazepatch.regions import Chunk, Regions, sort_chunk


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
        self.tables.forget("readable")
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
        super().select_rows(rows)
        self.last_row = None  # rows of the mask need not have changed places too
        if self.shown is not None and len(self.shown) > 1:
            self.shown = self.shown[rows.cpu()]


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
        behind = self._slots < self.state.length + self.state.new_tokens
        key, value = self._others() if behind or (self.gazes and self.state.decoding) else self.logical()
        return key, value

    def crop(self, tokens_to_remove: int) -> None:
        """Images stay when tokens of the text are forgotten: the mask says who sees them."""


def state_of_images(
    cache: Cache | None, owner: object, config: GazeConfig, layers: Sequence[int], gaze_layers: Collection[int]
) -> CrossState:
    """What the cross-attention `layers` of a cache share; they are made ready in place when the cache is new.

    Raises:
        CacheError: They are of a kind that cannot gaze.
    """
    if cache is None:
        return CrossState(owner, config)
    held = [cache.layers[i] for i in layers]
    if isinstance(first := held[0], CrossLayer):
        assert isinstance(first.state, CrossState)
        first.state.take_settings(config)
        return first.state
    if others := sorted({type(layer).__name__ for layer in held if type(layer) is not DynamicLayer}):
        raise CacheError(f"expected DynamicLayer for keys of images, got {', '.join(others)}: start with a new cache")
    state = CrossState(owner, config)
    for i in layers:
        cache.layers[i] = CrossLayer(state, gazes=i in gaze_layers, leads=i == layers[0])
    return state


def new_keys(adapter: Adapter, model_config: Any, arguments: Mapping[str, Any], rows: int) -> tuple[int, list[Span]]:
    """How many keys a forward brings to each row, and where the images are among them, from the decoder's arguments."""
    states = arguments.get(adapter.cross_states)
    if states is None:
        return 0, []
    keys = states.numel() // (rows * states.shape[-1])
    return keys, adapter.cross_spans(model_config, keys)


def visible(mask: Tensor) -> Tensor:
    """A mask, boolean or to be added to scores, as booleans."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))
