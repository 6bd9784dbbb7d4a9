"""The gaze cache: transformers' own `DynamicCache` object with its layers replaced, in place, while it is empty.

`DynamicCache` copies every entry at every step. A `GazeLayer` appends in place, keeps visual entries region by region
in a store of their own, and knows the descriptors of their windows. What all layers share (where the visual tokens
are) is kept once, in the cache's `GazeState`.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from gazepatch.config import GazeConfig
from gazepatch.errors import CacheError
from gazepatch.insertion import Insertion, Slots
from gazepatch.layout import Span
from gazepatch.ops.decode import DecodePlan, Entries
from gazepatch.regions import ABSENT, Chunk, Regions, sort_chunk, take
from gazepatch.stats import Counters

#: Room for new entries: an eighth of what is held, at least this many. Rare copies, and little memory held in vain.
LEAST_ROOM = 128

#: Tables that change with every token.
_GROWING = ("region_of", "logical_order")


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
    """

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

    # ---- one forward

    def seen(self, slots: int) -> int:
        """What a layer with so many slots says it has seen: context tokens count inside the text decoder only."""
        return slots if self.running else slots - self.slots.inserted

    @property
    def tokens(self) -> int:
        """Tokens seen before the running forward, without context tokens."""
        return self.length - self.slots.inserted

    def begin(self, spans: Sequence[Span], rows: int, new_tokens: int, insertion: Insertion | None = None) -> None:
        """A forward of `new_tokens` slots in each of `rows` rows starts; `spans` are its visual tokens, by slot."""
        if self.broken:
            raise CacheError(
                "the last forward on this cache failed half-way and left it incomplete: start with a new one"
            )
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
        for name in ("chunk", "regions", "plan", *_GROWING):
            self._forget(name)

    # ---- what the layers ask

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of the row that has most."""
        rows = [span.row for span in self.spans]
        return max((sum(s.tokens for s in self.spans if s.row == row) for row in set(rows)), default=0)

    def other_positions(self) -> Tensor | None:
        """`[b, T]` position of every entry that is not visual, the running forward's included; None: all in order."""
        if self._other is None:
            return None
        tail = torch.arange(self.other_end, self.length + self.new_tokens)
        return torch.cat([self._other, tail.expand(len(self._other), -1)], 1) if len(tail) else self._other

    def logical_order(self) -> Tensor:
        """`[b, L]` for every position, its place among the visual slots followed by the other entries."""
        other, visual = self.other_positions(), self._visual
        assert other is not None and visual is not None
        visual, other = _same_rows(visual, other)
        held = torch.cat([visual, other], 1)
        places = torch.arange(held.shape[1]).expand_as(held)
        order = torch.empty(len(held), self.length + self.new_tokens + 1, dtype=torch.long)
        # Padding (-1) lands in the extra last column.
        return order.scatter_(1, torch.where(held < 0, order.shape[1] - 1, held), places)[:, :-1]

    def region_of(self) -> Tensor:
        """`[b, L]` region of every position, -1 where there is no visual token."""
        assert self.regions is not None and self._visual is not None
        visual, regions = self._visual, self.regions
        number = torch.full((len(visual), self.length + self.new_tokens + 1), -1)
        for row in range(len(visual)):  # at prefill only, where each row has its own layout
            length = regions.length[row % len(regions.length)]
            held = visual[row][visual[row] >= 0]
            number[row, held] = torch.arange(len(length)).repeat_interleave(length)
        return number[:, :-1]

    def recorded(self) -> tuple[Tensor, Tensor]:
        """`Slots.source` and `Slots.context`."""
        assert self.slots.source is not None and self.slots.context is not None
        return self.slots.source, self.slots.context

    def every_slot(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Position of every slot, the running forward's included, and whether it holds a context token, `[B, L]`."""
        source, context = self.table("recorded", device)
        end = self.length + self.new_tokens
        tail = torch.arange(self.slots.recorded, end, device=device).expand(len(source), -1) - self.slots.inserted
        held = torch.cat([source, tail], 1), torch.cat([context, torch.zeros_like(tail, dtype=torch.bool)], 1)
        return held[0][:, :end], held[1][:, :end]

    def table(self, name: str, device: torch.device) -> Any:
        """One of the tables above, on a layer's device; made once for all layers."""
        key = (f"{name} {self.length + self.new_tokens}" if name in _GROWING else name, device)
        if key not in self._devices:
            self._forget(name, device)
            source: Any = getattr(self, name)
            source = source() if callable(source) else source
            self._devices[key] = _on(source, device)
        return self._devices[key]

    def plan(self, query: Tensor, entries: Entries) -> DecodePlan:
        """How to decode, for layers with as many heads as these; made anew only when the sequence gets new regions."""
        batch, heads, key_heads = len(query), query.shape[1], entries.key.shape[1]
        key = (f"plan {batch} {heads} {key_heads}", query.device)
        if key not in self._devices:
            self._devices[key] = DecodePlan(self.table("regions", query.device), self.config, batch, heads, key_heads)
        plan: DecodePlan = self._devices[key]
        return plan

    def bias(self, mask: Tensor | None) -> Tensor | None:
        """`[b, 1, 1, T]` for the scores of a decode query with the other entries, from its mask over all positions.

        Args:
            mask: `[B, 1, 1, L]`, boolean (True: visible) or to be added; or None when everything is visible.
        """
        positions = self.other_positions()
        assert positions is not None
        padded = bool((positions < 0).any())
        if mask is None and not padded:
            return None
        if mask is None:
            return torch.where(positions < 0, ABSENT, 0.0)[:, None, None]
        positions = positions.to(mask.device).expand(mask.shape[0], -1)
        row = mask[:, 0, -1].gather(1, positions.clamp(min=0))
        row = torch.where(row, 0.0, ABSENT) if row.dtype == torch.bool else row.float().clamp(min=ABSENT)
        return row.masked_fill(positions < 0, ABSENT)[:, None, None]

    # ---- changes by generation methods

    def crop(self, tokens: int) -> None:
        """Forget the last `tokens` tokens, none of which may be visual."""
        self.check_crop(tokens)
        self.length -= tokens
        self.slots.crop(self.length)
        self._forget("recorded")
        self.spans = [span for span in self.spans if span.stop <= self.length]
        if self._other is not None and self.length < self.other_end:
            self._other, self.other_end = self._other[:, : self.length - self.other_end], self.length

    def check_crop(self, tokens: int) -> None:
        """Raise CacheError unless the last `tokens` tokens can be forgotten."""
        last_visual = -1 if self._visual is None or not self._visual.numel() else int(self._visual.max())
        last = max(last_visual, self.slots.last_context())
        if tokens > self.length or self.length - tokens <= last:
            raise CacheError(
                f"cannot crop {tokens} of {self.tokens} tokens: only text behind the last image can be forgotten, "
                f"{self.length - 1 - last} tokens here. Keep a copy of the cache from before the image instead"
            )

    def select_rows(self, rows: Tensor) -> None:
        """Keep the rows of the batch with these numbers, in this order."""
        self.slots.select_rows(rows)
        if self._visual is not None and len(self._visual) > 1:
            self._visual = self._visual[rows.cpu()]
        if self._other is not None and len(self._other) > 1:
            self._other = self._other[rows.cpu()]
        if self.regions is not None:
            self.regions = self.regions.select_rows(rows)
        else:  # not sorted yet: rows may still have to be
            picked = enumerate(rows.tolist())
            self.spans = [replace(span, row=i) for i, row in picked for span in self.spans if span.row == row]
        self._devices.clear()


def _on(table: Any, device: torch.device) -> Any:
    if isinstance(table, tuple):
        return tuple(part.to(device) for part in table)
    return None if table is None else table.to(device)


def _same_rows(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    rows = max(len(a), len(b))
    return a.expand(rows, -1), b.expand(rows, -1)


def _cat_rows(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat(_same_rows(a, b), 1)


class GazeLayer(DynamicLayer):
    """Keys and values of one decoder layer, `[B, H_kv, T, D]` for text and `[B, H_kv, N, D]` for visual tokens.

    A layer that does not gaze (`gazes=False`) keeps all its entries as text, in their own order.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, state: GazeState, gazes: bool, leads: bool) -> None:
        self.state, self.gazes, self.leads = state, gazes, leads
        self._clear()

    def _clear(self) -> None:
        self.is_initialized = False
        self._slots = self._used = 0  # slots filled; other entries held
        self._other: tuple[Tensor, Tensor] | None = None  # with room for more behind `_used`
        self._visual: tuple[Tensor, Tensor] | None = None
        self._means: tuple[Tensor, Tensor | None] | None = None

    # ---- filling

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember dtype and device; the stores are made by the first update."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append `[B, H_kv, S, D]` keys and values; returns what the attention of this forward reads.

        That is the whole sequence in its own order, except for a routed decode step, whose attention reads the stores
        (`entries`) and gets the other entries here.
        """
        if not self.state.running:
            raise CacheError(
                "this cache was filled by a patched model and can only be used with it while it is patched: "
                "start with a new cache after gazepatch.restore, or with another model"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first = self._slots == 0
        self._slots += key_states.shape[-2]
        if self.state.chunk is None or not self.gazes:
            self._append(key_states, value_states)
        else:
            chunk: Chunk = self.state.table("chunk", key_states.device)
            if chunk.tokens > key_states.shape[-2]:
                key_states, value_states = self._take_back(key_states, value_states)
            self._append(chunk.other_entries(key_states), chunk.other_entries(value_states))
            self._append_visual(chunk.visual_entries(key_states), chunk.visual_entries(value_states), chunk)
        if first:
            return key_states, value_states
        return self._others() if self.gazes and self.state.decoding else self.logical()

    def _take_back(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Empty the store of other entries, to be sorted again together with new ones."""
        held, self._other, self._used = self._others(), None, 0
        return torch.cat([held[0], key], 2), torch.cat([held[1], value], 2)

    def _append(self, key: Tensor, value: Tensor) -> None:
        start, self._used = self._used, self._used + key.shape[-2]
        if self._other is None or self._used > self._other[0].shape[-2]:
            room = max(LEAST_ROOM, self._used // 8)
            self._other = _grown(self._other, start, self._used + room, (key, value))
        for store, new in zip(self._other, (key, value), strict=True):
            store.narrow(2, start, new.shape[2]).copy_(new)

    def _append_visual(self, key: Tensor, value: Tensor, chunk: Chunk) -> None:
        mean_keys = chunk.means(key)
        mean_values = chunk.means(value) if self.state.config.periphery else None
        if self._visual is not None and self._means is not None:
            key, value = (torch.cat(pair, 2) for pair in zip(self._visual, (key, value), strict=True))
            mean_keys = torch.cat([self._means[0], mean_keys], 2)
            if mean_values is not None and self._means[1] is not None:
                mean_values = torch.cat([self._means[1], mean_values], 2)
        self._visual = key.contiguous(), value.contiguous()
        # Windows innermost: scores are then products with rows of memory.
        self._means = mean_keys.mT.contiguous().mT, mean_values

    # ---- reading

    def entries(self) -> Entries:
        """Everything the layer holds, as a routed decode step reads it."""
        assert self._visual is not None and self._means is not None
        return Entries(*self._others(), *self._visual, *self._means)

    @property
    def mean_keys(self) -> Tensor | None:
        """`[B, H_kv, R * C, D]` descriptors of the windows, or None before the first visual token."""
        return None if self._means is None else self._means[0]

    @property
    def mean_values(self) -> Tensor | None:
        """`[B, H_kv, R * C, D]` mean values of the windows, kept for the periphery."""
        return None if self._means is None else self._means[1]

    def _others(self) -> tuple[Tensor, Tensor]:
        assert self._other is not None
        key, value = self._other
        return key.narrow(2, 0, self._used), value.narrow(2, 0, self._used)

    def logical(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, H_kv, L, D]` in the order of the sequence: a copy, or a view if none is visual."""
        if self._visual is None:
            return self._others()
        order = self.state.table("logical_order", self._visual[0].device)
        key, value = (take(torch.cat(pair, 2), order) for pair in zip(self._visual, self._others(), strict=True))
        return key, value

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """`[B, H_kv, L, D]` in the order of the sequence, for whoever looks into a cache."""
        return self.logical()[0] if self._other is not None else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """`[B, H_kv, L, D]` in the order of the sequence."""
        return self.logical()[1] if self._other is not None else None

    def nbytes(self) -> int:
        """Memory of all stores, with the room for new entries."""
        tensors = [*(self._other or ()), *(self._visual or ()), *(self._means or ())]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    # ---- what transformers asks of a layer

    def get_seq_length(self) -> int:
        """Tokens seen; inside the text decoder, context tokens count."""
        return self.state.seen(self._slots)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask for `query_length` new tokens covers."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything, keep the object."""
        self._clear()
        if self.leads:
            self.state.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; a positive number is the length to keep (transformers 5.16)."""
        tokens = -tokens_to_remove if tokens_to_remove <= 0 else max(self.get_seq_length() - tokens_to_remove, 0)
        if tokens == 0:
            return
        if self.leads:
            self.state.crop(tokens)
        self._slots -= tokens
        self._used -= tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows `beam_idx` `[B]`, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self._other is not None:
            self.batch_select_indices(torch.arange(len(self._other[0])).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` `[B]`."""
        if self._other is None:
            return
        rows = indices.to(self.device)
        key, value = self._other
        self._other = key[rows], value[rows]
        if self._visual is not None and self._means is not None:
            key, value = self._visual
            self._visual = key[rows], value[rows]
            mean_values = self._means[1]
            self._means = self._means[0][rows], None if mean_values is None else mean_values[rows]
        if self.leads:
            self.state.select_rows(indices)

    def offload(self) -> None:
        """Refuse: an offloaded layer cannot be read region by region."""
        raise CacheError("a gaze cache cannot be offloaded: generate without cache_implementation='offloaded'")

    prefetch = offload


class WindowLayer(DynamicSlidingWindowLayer):
    """A sliding window among context tokens: it counts positions, so it holds as many slots more as were inserted."""

    def __init__(self, state: GazeState, window: int) -> None:
        self.state, self.positions = state, window
        super().__init__(window)

    @property
    def sliding_window(self) -> int:
        """Slots among which the whole window is, whatever they hold. The mask hides those outside."""
        return self.positions + self.state.slots.inserted

    @sliding_window.setter
    def sliding_window(self, window: int) -> None:
        self.positions = window

    def get_seq_length(self) -> int:
        """Tokens seen; inside the text decoder, context tokens count."""
        return self.state.seen(self.cumulative_length)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask for `query_length` new tokens covers."""
        seen = self.get_seq_length()
        if self.state.running:  # slots were dropped when fewer were inserted than now
            kept = 0 if self.keys is None else min(self.keys.shape[-2], self.sliding_window - 1)
        else:
            kept = min(seen, self.positions - 1)
        return kept + query_length, seen - kept


def _grown(
    held: tuple[Tensor, Tensor] | None, used: int, room: int, like: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    stores = []
    for i, new in enumerate(like):
        store = new.new_empty(*new.shape[:2], room, new.shape[3])
        if held is not None:
            store[:, :, :used] = held[i][:, :, :used]
        stores.append(store)
    return stores[0], stores[1]


def gaze_state(cache: object) -> GazeState | None:
    """The state of a cache that a patched model fills, or None for any other."""
    return getattr(cache, "gaze", None)


def adopt(cache: object, owner: object, config: GazeConfig, layers: int, gaze_layers: Sequence[int]) -> GazeState:
    """Make an empty `DynamicCache` a gaze cache, in place; return the state of one that is the owner's already.

    Raises:
        CacheError: The cache is another patch's, holds entries, or is of a kind that cannot gaze.
    """
    if (state := gaze_state(cache)) is not None:
        if state.owner() is not owner:
            raise CacheError(
                "this cache was filled by another model, or before the model was restored and patched again: "
                "start with a new cache"
            )
        return state
    if not isinstance(cache, DynamicCache) or getattr(cache, "offloading", False):
        kind = "an offloaded cache" if isinstance(cache, DynamicCache) else f"a {type(cache).__name__}"
        raise CacheError(
            f"a patched model needs transformers' plain DynamicCache, got {kind}: generate with "
            "cache_implementation='dynamic', or pass past_key_values=DynamicCache()"
        )
    if _holds_entries(cache):
        raise CacheError(
            "this cache was filled by a model that was not patched: patch the model first, then start with a new cache"
        )
    state = GazeState(owner, config)
    _replace_layers(cache, state, layers, gaze_layers)
    cache.gaze = state  # type: ignore[attr-defined]
    return state


def _holds_entries(cache: Cache) -> bool:
    layers: list[Any] = cache.layers
    return any(getattr(layer, "is_initialized", False) and layer.get_seq_length() > 0 for layer in layers)


def _replace_layers(cache: Cache, state: GazeState, layers: int, gaze_layers: Sequence[int]) -> None:
    # A cache made without a configuration has no layers yet: it would make plain ones as they are asked for.
    kinds = [type(layer) for layer in cache.layers] or [DynamicLayer] * layers
    plain = [i for i, kind in enumerate(kinds) if kind is DynamicLayer]
    made = list(cache.layers) or [DynamicLayer() for _ in kinds]
    if missing := sorted(set(gaze_layers) - set(plain)):
        raise CacheError(
            f"layers {missing} were to gaze, but the cache keeps them as {[kinds[i].__name__ for i in missing]}"
        )
    leader = next(iter(gaze_layers), plain[0] if plain else None)
    for i in plain:
        made[i] = GazeLayer(state, gazes=i in gaze_layers, leads=i == leader)
    if state.config.context_tokens:
        for i, layer in enumerate(made):
            if type(layer) is DynamicSlidingWindowLayer:
                made[i] = WindowLayer(state, layer.sliding_window)
    cache.layers[:] = made
