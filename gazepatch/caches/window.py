"""Sliding windows of a gaze cache."""

from __future__ import annotations

from transformers.cache_utils import DynamicSlidingWindowLayer

from gazepatch.caches.state import GazeState


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
