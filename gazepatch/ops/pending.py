"""The newest entry of a decode step, on its way into its layer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PendingEntry(NamedTuple):
    """An entry that a routed step writes after the others of its layer, before it reads them.

    A kernel that runs anyway does so by the way: that spares two launches in every layer and step.

    Attributes:
        stores: `[B, H_kv, T, D]` keys and `[B, H_kv, T, D_v]` values with room for it, contiguous; or one that is both.
        entry: `[B, H_kv, 1, D]`, for each of the stores.
        filled: A number on the device, on which the slot depends in a static cache; or None.
        offset: What is added to that number, or to 0, is the slot.
    """

    stores: tuple[Tensor, ...]
    entry: tuple[Tensor, ...]
    filled: Tensor | None
    offset: int

    def fits(self) -> bool:
        """Whether it has the shape that the stores want: a kernel writes without looking."""
        pairs = zip(self.stores, self.entry, strict=True)
        return all(new.shape == (*store.shape[:2], 1, store.shape[3]) for store, new in pairs)

    def write(self) -> None:
        """Write it, a store after the other."""
        slot = None if self.filled is None else self.filled.view(1) + self.offset
        for store, new in zip(self.stores, self.entry, strict=True):
            if slot is None:
                store.narrow(2, self.offset, 1).copy_(new)
            else:
                store.index_copy_(2, slot, new)
