"""Layers of a gaze cache that hold more than keys and values."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from gazepatch.caches.layer import GazeLayer
from gazepatch.caches.state import GazeState


class HybridLayer(LinearAttentionAndFullAttentionLayer, GazeLayer):  # type: ignore[misc, override]
    """A `GazeLayer` that keeps the last inputs of short convolutions too, as transformers' layer does (Inkling)."""

    def __init__(self, state: GazeState, gazes: bool, leads: bool, number_of_states: int) -> None:
        GazeLayer.__init__(self, state, gazes, leads)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *keys_and_values: Tensor, **of_state: Any) -> None:  # type: ignore[override]
        """Remember dtype and device of keys and values, or of one state."""
        if keys_and_values:
            GazeLayer.lazy_initialization(self, *keys_and_values)
        else:
            LinearAttentionLayer.lazy_initialization(self, **of_state)

    def reset(self) -> None:
        """Forget everything, keep the object."""
        LinearAttentionLayer.reset(self)
        GazeLayer.reset(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens, if the states before them were recorded."""
        self._to_crop(tokens_to_remove)
        LinearAttentionLayer.crop(self, tokens_to_remove)
        GazeLayer.crop(self, tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows `beam_idx` `[B]`, for beam search."""
        GazeLayer.reorder_cache(self, beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` `[B]`."""
        if self._other is not None:
            indices = self._numbers(indices)
        LinearAttentionLayer.reorder_cache(self, indices)  # type: ignore[arg-type]
        GazeLayer.batch_select_indices(self, indices)

    def offload(self) -> None:
        """Refuse, as any gaze layer."""
        GazeLayer.offload(self)

    prefetch = offload
