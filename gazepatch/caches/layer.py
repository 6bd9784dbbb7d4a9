"""The layers of a gaze cache.

transformers' `DynamicCache` copies every entry at every step. A `GazeLayer` appends in place, keeps visual entries
region by region in a store of their own, and knows the descriptors of their windows. What all layers share (where the
visual tokens are) is kept once, in the cache's `GazeState`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from gazepatch.buffers import locked
from gazepatch.caches.state import GazeState
from gazepatch.chunk import Chunk, take
from gazepatch.errors import CacheError
from gazepatch.ops.decode import Entries
from gazepatch.ops.pending import PendingEntry
from gazepatch.ops.plan import means_of
from gazepatch.uncompiled import uncompiled

#: Room for new entries: an eighth of what is held, at least this many. Rare copies, and little memory held in vain.
MIN_ROOM = 128

#: Tensors `[B, H, T, D]` of the same tokens: keys and values, or one that is both.
Stores = tuple[Tensor, ...]


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
        self._other: Stores | None = None  # with room for more after `_used`
        self._visual: Stores | None = None
        self._means: Stores | None = None  # of the values with periphery only
        self._pending: PendingEntry | None = None
        self._lent = False  # a graph for gradients may keep the store of others as it is

    # ---- filling

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember dtype and device; the stores are made by the first update."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    @uncompiled
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append `[B, H_kv, S, D]` keys and values; returns what the attention of this forward reads.

        That is the whole sequence in its own order, except for a routed decode step, whose attention reads the stores
        (`entries`): it gets back what it brings, which waits to be taken (`take_late`).
        """
        if not self.state.running:
            raise CacheError(
                "this cache was filled by a patched model and can only be used with it while it is patched: "
                "start with a new cache after gazepatch.restore, or with another model"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._lent and not torch.is_grad_enabled():
            self._cut_off()
        first = self._slots == 0
        self._slots += key_states.shape[-2]
        new = self._stored(key_states, value_states)
        if self.gazes and self.state.decoding and self.state.chunk is None:
            self._defer(self._after_others(new))
            return key_states, value_states
        self._keep(new)
        return (key_states, value_states) if first else self.logical()

    def _stored(self, key: Tensor, value: Tensor) -> Stores:
        return key, value

    def _keep(self, new: Stores) -> None:
        if self.state.chunk is None or not self.gazes:
            self._append(new)
            return
        chunk: Chunk = self.state.table("chunk", new[0].device)
        if (back := chunk.tokens - new[0].shape[-2]) > 0:
            # What was kept as text until now is sorted together with what is new.
            new = _joined(self._taken_back(back), new)
        self._append(tuple(chunk.other_entries(x) for x in new))
        self._append_visual(tuple(chunk.visual_entries(x) for x in new), chunk)

    def _taken_back(self, entries: int) -> Stores:
        """The last so many other entries, which are none any more."""
        held, rest = self._others(), self._used - entries
        self._other, self._used = None, 0  # and their room with them
        if rest:
            self._append(tuple(x[:, :, :rest] for x in held))
        return tuple(x[:, :, rest:] for x in held)

    def _append(self, new: Stores) -> None:
        start, self._used = self._used, self._used + new[0].shape[-2]
        self._make_room(start, new)
        assert self._other is not None
        for store, of_store in zip(self._other, new, strict=True):
            store.narrow(2, start, of_store.shape[2]).copy_(of_store)

    def _after_others(self, new: Stores) -> PendingEntry:
        self._write_late()
        start, self._used = self._used, self._used + 1
        self._make_room(start, new)
        assert self._other is not None
        return PendingEntry(self._other, new, None, start)

    def _defer(self, pending: PendingEntry) -> None:
        if not pending.fits():
            held, new = (tuple(x.shape) for x in (pending.stores[0], pending.entry[0]))
            raise CacheError(
                f"this cache holds keys {held}, and a step brought {new}: keep its rows, or start a new one"
            )
        self._pending = pending

    def take_pending(self) -> PendingEntry | None:
        """The newest entry, if it is not written yet: whoever takes it has to."""
        pending, self._pending = self._pending, None
        return pending

    def _write_late(self) -> None:
        if (pending := self.take_pending()) is not None:
            pending.write()

    def _make_room(self, start: int, new: Stores) -> None:
        """Have a store of other entries with room for all that are used; the first `start` of them are held."""
        if self._other is None or self._used > self._other[0].shape[-2] or self._lent or locked(self._other[0]):
            room = max(MIN_ROOM, self._used // 8)
            self._other = _grown(self._other, start, self._used + room, new)
        self._lent = torch.is_grad_enabled()

    def _cut_off(self) -> None:
        # An entry without gradients ends those of all before it, as in transformers' caches. Others are copied anyway.
        if self._visual is not None and self._means is not None:
            self._visual, self._means = (tuple(x.detach() for x in stores) for stores in (self._visual, self._means))

    def _append_visual(self, new: Stores, chunk: Chunk) -> None:
        config = self.state.config
        means: Stores = tuple(means_of(chunk, x, config) for x in (new if config.periphery else new[:1]))
        if self._visual is not None and self._means is not None:
            new, means = _joined(self._visual, new), _joined(self._means, means)
        self._visual = self._placed("visual", tuple(x.contiguous() for x in new))
        if means[0].device.type == "cpu" and len(new) > 1:  # not what is read as values too
            # Windows innermost: scores are then products with rows of memory. A kernel reads the other way round.
            means = (means[0].mT.contiguous().mT, *means[1:])
        self._means = self._placed("means", means)

    def _placed(self, name: str, stores: Stores) -> Stores:
        """What is made anew for a prompt, where it is to lie."""
        return stores

    # ---- reading

    def entries(self) -> Entries:
        """Everything the layer holds, as a routed decode step reads it."""
        assert self._visual is not None and self.mean_keys is not None
        key, value, visual_key, visual_value = *self._others(), *self._visual
        return Entries(key, value, visual_key, visual_value, self.mean_keys, self.mean_values)

    @property
    def mean_keys(self) -> Tensor | None:
        """`[B, H_kv, R * C, D]` descriptors of the windows, or None before the first visual token."""
        return None if self._means is None else self._means[0]

    @property
    def mean_values(self) -> Tensor | None:
        """`[B, H_kv, R * C, D]` mean values of the windows, kept for the periphery."""
        return None if self._means is None or not self.state.config.periphery else self._means[-1]

    def _others(self) -> Stores:
        self._write_late()
        return self._held()

    def _held(self) -> Stores:
        """The other entries, the last of which may be late."""
        assert self._other is not None
        return tuple([x.narrow(2, 0, self._used) for x in self._other])

    def logical(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, H_kv, L, D]` in the order of the sequence: a copy, or a view if none is visual."""
        key, value = self._in_order()
        return key, value

    def _in_order(self) -> Stores:
        if self._visual is None:
            return self._others()
        order = self.state.table("logical_order", self._visual[0].device)
        return tuple(take(x, order) for x in _joined(self._visual, self._others()))

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
        return sum(t.numel() * t.element_size() for t in tensors)

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
        if (tokens := self._to_crop(tokens_to_remove)) == 0:
            return
        if self.leads:
            self.state.crop(tokens)
        self._slots -= tokens
        self._used -= tokens

    def _to_crop(self, tokens_to_remove: int) -> int:
        """How many tokens to forget, all of which can be; the first layer to be asked refuses for all."""
        number = int(tokens_to_remove)  # assisted generation has it in a tensor
        tokens = -number if number <= 0 else max(self.get_seq_length() - number, 0)
        if tokens and self._slots == self.state.length:  # the layer that leads did not forget them yet
            self.state.check_crop(tokens)
        return tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows `beam_idx` `[B]`, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self._other is not None:
            self.batch_select_indices(torch.arange(len(self._other[0])).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` `[B]`: their numbers, or a mask."""
        if self._other is None:
            return
        self._write_late()
        rows = self._numbers(indices)
        self._other = tuple(x[rows] for x in self._other)
        if self._visual is not None and self._means is not None:
            self._visual = tuple(x[rows] for x in self._visual)
            self._means = tuple(x[rows] for x in self._means)
        if self.leads:
            self.state.select_rows(rows)

    def _numbers(self, indices: Tensor) -> Tensor:
        """Numbers of the rows that `indices` stand for, on the layer's device."""
        assert self._other is not None
        return torch.arange(len(self._other[0]), device=self.device)[indices]

    def offload(self) -> None:
        """Refuse: an offloaded layer cannot be read region by region."""
        raise CacheError("a gaze cache cannot be offloaded: generate without cache_implementation='offloaded'")

    prefetch = offload


def _joined(held: Stores, new: Stores) -> Stores:
    return tuple(torch.cat(pair, 2) for pair in zip(held, new, strict=True))


def _grown(held: Stores | None, used: int, room: int, like: Stores) -> Stores:
    stores = tuple(new.new_empty(*new.shape[:2], room, new.shape[3]) for new in like)
    if held is not None:
        for store, of_store in zip(stores, held, strict=True):
            store[:, :, :used] = of_store[:, :, :used]
    return stores
