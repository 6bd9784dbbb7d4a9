"""The layers of a static gaze cache.

Memory for all tokens there will ever be is taken at the prompt. A decode step then changes nothing but what is in it:
its tensors keep their shapes and addresses, lengths and counts are numbers on the device, and no Python value differs
from one step to the next. So a step compiles once, and can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from gazepatch.buffers import StableBuffers, mark_static
from gazepatch.caches.layer import GazeLayer, Stores
from gazepatch.caches.order import same_rows
from gazepatch.caches.state import GazeState, bias_of
from gazepatch.config import GazeConfig
from gazepatch.counters import StepCounters
from gazepatch.errors import CacheError
from gazepatch.ops.pending import PendingEntry
from gazepatch.score_mod import as_bias


class StaticState(GazeState):
    """What the layers of a static cache share.

    Attributes:
        capacity: Tokens there is room for.
        ready: Whether everything that decode steps need is made. `length` is then that of the last prompt; how long the
            sequence is by now, the device knows.
        filled: Slots filled before the running forward, a number on the device of the first layer; None before it.
    """

    counters: StepCounters
    filled: Tensor | None = None

    def __init__(self, owner: object, config: GazeConfig, capacity: int) -> None:
        super().__init__(owner, config)
        self.capacity = capacity
        self.counters = StepCounters()
        self._buffers = StableBuffers()

    def clear(self) -> None:
        """Forget the sequence."""
        super().clear()
        self.ready = False
        if self.filled is not None:
            self.filled.zero_()
        self._expected: dict[int, tuple[Tensor, int, int]] = {}

    # ---- prompts

    @property
    def room(self) -> int:
        """Slots there is room for."""
        return self.capacity + self.slots.inserted

    @property
    def reach(self) -> int:
        """Slots that the tables cover: those to come as well, once a prompt is over."""
        return self.room if self.ready else super().reach

    def catch_up(self) -> None:
        """Ask the device how long the sequence is, which waits for it: a prompt starts."""
        if self.ready and self.filled is not None:
            self.length = int(self.filled)
            if self.length > self.room:
                raise CacheError(
                    f"this static cache has room for {self.capacity} tokens, and steps brought it to {self.tokens}: "
                    "make one with a larger max_cache_len"
                )

    def _make_way(self, tokens: int) -> None:
        if tokens > self.capacity:
            raise CacheError(
                f"this static cache has room for {self.capacity} tokens, got {tokens}: make one with a larger "
                "max_cache_len"
            )
        self.ready = False  # as only prompts start so

    def finish(self, completed: bool) -> None:
        """The forward is over; a prompt leaves everything ready for steps."""
        if self.ready:
            self.running = self.decoding = False
            self.broken = not completed
            if self.filled is not None:
                self.filled.add_(1)
            return
        super().finish(completed)
        if completed:
            if self.filled is not None:
                self.filled.fill_(self.length)
            self._make_ready()

    def count_on(self, device: torch.device) -> None:
        """Have `filled`, on the device of the first layer that asks."""
        if self.filled is None:
            self.filled = mark_static(torch.zeros((), dtype=torch.long, device=device))

    def expect(self, layer: int, query: Tensor, key_heads: int, value_dim: int) -> None:
        """A layer that gazes was seen in a prompt: it will ask for a plan, with queries `[B, H, Q, D]` like these."""
        if not self.ready:
            self._expected[layer] = query.new_empty(*query.shape[:2], 0, query.shape[3]), key_heads, value_dim

    def _make_ready(self) -> None:
        self.ready = True
        self.tables.forget("other_positions", "logical_order", "slot_positions")
        for layer, (query, key_heads, value_dim) in self._expected.items():
            (batch, heads), device = query.shape[:2], query.device
            selections = heads if self.config.head_reduce == "none" else key_heads
            visual = selections * sum(span.tokens for span in self.spans)
            read: int | None = visual
            if self.slots.inserted:
                self.table("slot_positions", device)
            if self.regions is not None:
                self.table("other_positions", device)
                self.table("logical_order", device)
                plan = self.plan_of(batch, heads, key_heads, device)
                plan.prepare(query, value_dim, self._buffers)
                visual, read = plan.visual_entries, plan.always_read
            if self.spans:
                self.counters.expect(layer, visual, read, selections * self.slots.context_tokens, device)

    def slot_positions(self) -> Tensor:
        """`[b, room]` position of every slot; -1 for padding."""
        return self.slots.upto(self.room)[0]

    # ---- steps

    def step(self) -> None:
        """A decode step starts."""
        self.check_whole()
        self.running = self.broken = True
        self.decoding = self.regions is not None
        if self.counters.each:  # of a sequence with visual tokens
            self.counters.step()

    def bias(self, mask: Tensor | None, device: torch.device) -> Tensor | None:
        """`[b, 1, 1, T]`, as of the base; room that is not filled yet is hidden as well."""
        if not self.ready:
            return super().bias(mask, device)
        assert self.filled is not None
        positions: Tensor = self.table("other_positions", device)
        visible = (positions >= 0) & (positions <= self.filled.to(device))  # the step's own too
        if mask is None:
            return as_bias(visible)[:, None, None]
        row = mask.to(device)[:, 0, -1]
        if row.shape[1] < self.room:  # padding only: of the tokens so far
            row = torch.nn.functional.pad(row, (0, self.room - row.shape[1]), value=True)
        row, positions = same_rows(row, positions)
        return bias_of(row.gather(1, positions.clamp(min=0)), ~visible)

    # ---- changes by generation methods

    def crop(self, tokens: int) -> None:
        """Forget the last `tokens` tokens, which waits for the device."""
        self.catch_up()
        self.check_crop(tokens)
        super().crop(tokens)
        if self.filled is not None:
            self.filled.fill_(self.length)
        self._go_on()

    def select_rows(self, rows: Tensor) -> None:
        """Keep the rows of the batch with these numbers, in this order."""
        super().select_rows(rows)
        self._go_on()

    def _go_on(self) -> None:
        """Have steps go on with another sequence than before."""
        if self.ready:
            self.counters.fold()
            self.counters.each.clear()  # nothing at all, where no image is left
            self._make_ready()


class StableLayer(GazeLayer):
    """A layer whose stores lie where those of the last prompt lay."""

    state: StaticState
    is_compileable = True

    def __init__(self, state: StaticState, gazes: bool, leads: bool) -> None:
        super().__init__(state, gazes, leads)
        self._buffers = StableBuffers()

    def _placed(self, name: str, stores: Stores) -> Stores:
        return tuple(self._buffers.keep((name, i), store) for i, store in enumerate(stores))


class StaticGazeLayer(StableLayer):
    """A `GazeLayer` that takes its memory once: for the visual entries of a prompt, and for all others to come."""

    _apart: int  # slots whose entries are not in the store of others
    is_croppable = getattr(StaticLayer, "is_croppable", False)  # from transformers 5.24 on

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember dtype and device; the stores are made by the first update."""
        super().lazy_initialization(key_states, value_states)
        self.state.count_on(self.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append `[B, H_kv, S, D]` keys and values; returns what the attention of this forward reads.

        In a prompt as the base does. In a step that is not routed, the store of other entries with all its room: no
        entry is visual, so that is the sequence in its own order.
        """
        if self.state.ready and self.state.running and self._other is not None:
            assert self.state.filled is not None
            new = self._stored(key_states, value_states)
            pending = PendingEntry(self._other, new, self.state.filled.to(self.device), -self._apart)
            if self.gazes and self.state.decoding:
                self._defer(pending)
                return key_states, value_states
            pending.write()
            return self.logical()
        self._slots = self.state.length
        self._used = self._slots - self._apart
        read = super().update(key_states, value_states)
        self._apart = self._slots - self._used
        return read

    def _clear(self) -> None:
        super()._clear()
        self._apart = 0

    def _make_room(self, start: int, new: Stores) -> None:
        room = self.state.room - (self._slots - self._used)
        held = self._other
        if held is not None and held[0].shape[2] == room:
            return
        made = tuple(x.new_zeros(*x.shape[:2], room, x.shape[3]) for x in new)
        self._other = self._placed("other", made)
        for store, before in zip(self._other, held or (), strict=False):
            store[:, :, :start] = before[:, :, :start]

    # ---- reading

    def _held(self) -> Stores:
        if self.state.ready and self._other is not None:
            return self._other
        return super()._held()

    # ---- what transformers asks of a layer

    def get_seq_length(self) -> int:
        """Tokens seen, a number on the device; inside the text decoder, context tokens count."""
        # A tensor under the type of an integer, as transformers' own static layers have it.
        return self.state.seen(cast(int, self.state.filled)) if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask covers: all there is room for."""
        return self.state.room if self.state.running else self.state.capacity, 0

    def get_max_length(self) -> int:
        """Tokens there is room for."""
        return self.state.capacity

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens, where transformers' own static layers can."""
        if not self.is_croppable:
            raise CacheError(
                "static caches cannot be cropped before transformers 5.24: generate with cache_implementation='dynamic'"
            )
        if (number := int(tokens_to_remove)) > 0:
            raise CacheError(f"expected minus the number of tokens to forget in a static cache, got {number}")
        if self.leads and number:
            self.state.crop(-number)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Put the rows `indices` `[B]` in the place of all, where they are."""
        if self._other is None:
            return
        if len(rows := self._numbers(indices)) != len(self._other[0]):
            raise CacheError(
                f"a static cache keeps its {len(self._other[0])} rows, got {len(rows)}: "
                "generate with cache_implementation='dynamic'"
            )
        self._write_late()
        for store in (*self._other, *(self._visual or ()), *(self._means or ())):
            store.copy_(store.index_select(0, rows))
        if self.leads:
            self.state.select_rows(rows)
