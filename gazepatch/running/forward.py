"""A running forward: what its layers ask for while it lasts."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from gazepatch.caches.layer import GazeLayer
from gazepatch.caches.state import GazeState
from gazepatch.caches.static import StaticState
from gazepatch.insertion import Insertion, OwnImage
from gazepatch.running.masks import Documents
from gazepatch.tracing import Trace


@dataclass
class Forward:
    """A running forward.

    Attributes:
        state: What its cache's layers share; of a temporary cache when the forward keeps none.
        cache: The cache, or None.
        past: Slots filled before it; -1 in a step on a static cache: only the device knows.
        tokens: Slots of its own.
        insertion: Where its context tokens are; None without any.
        routed: Columns of the new tokens whose queries gaze, `[Q]`; None when no query of a prompt does.
        routed_rows: `[B, Q]` which rows those are text in.
        trace: Who wants to know what this decode step reads; None: nobody.
        reads: For `trace`: by layer, what `DecodePlan.numbers` says; None where everything was read.
        documents: Sequences that are packed into its rows, where it has context tokens; None without any.
        cross_attention: The same as cross-attention layers see it, whose keys are images; None in other families.
        plain: Whether it is a step that the model's own attention takes as it would unpatched, in every layer.
        runs_again: Whether its layers will be run once more when it is over, for their gradients.
    """

    state: GazeState
    cache: Cache | None
    past: int
    tokens: int
    insertion: Insertion | None = None
    routed: Tensor | None = None
    routed_rows: Tensor | None = None
    trace: Trace | None = None
    reads: dict[int, Tensor | None] = field(default_factory=dict)
    documents: Documents | None = None
    cross_attention: Forward | None = None
    plain: bool = False
    runs_again: bool = False
    _own_images: dict[torch.device, OwnImage] = field(default_factory=dict)
    _bias: tuple[Tensor | None, torch.device, Tensor | None] | None = None

    @property
    def routes(self) -> bool:
        """Whether queries of a prompt gaze, in any layer."""
        return self.routed is not None or (self.cross_attention is not None and self.cross_attention.routed is not None)

    def layer(self, layer: int) -> GazeLayer:
        """The cache's layer of this index, which is one that gazes."""
        assert self.cache is not None
        store = self.cache.layers[layer]
        assert isinstance(store, GazeLayer)
        return store

    def bias(self, mask: Tensor | None, device: torch.device) -> Tensor | None:
        """`GazeState.bias`, worked out once for the layers that share a mask and a device."""
        if self._bias is None or self._bias[0] is not mask or self._bias[1] != device:
            self._bias = (mask, device, self.state.bias(mask, device))
        return self._bias[2]

    def own_image(self, insertion: Insertion, device: torch.device) -> OwnImage:
        """`own_image` of the forward's `insertion`, made once a device."""
        if device not in self._own_images:
            self._own_images[device] = OwnImage(*(table.to(device) for table in insertion.own_image()))
        return self._own_images[device]

    def count(self, layer: int, heads: int, key_heads: int, visual: int, read: int | Tensor) -> None:
        """Count what a layer read in a decode step: context tokens always, once for every selection."""
        if isinstance(self.state, StaticState):
            return self.state.counters.add_read(layer, read)
        selections = self._selections(heads, key_heads)
        self.state.counters.add(layer, visual, read, selections * self.state.slots.context_tokens)

    def expect_whole(self, layer: int, heads: int, key_heads: int) -> None:
        """Note what a layer counts as long as the sequence has few visual tokens, all of which every step reads."""
        self.state.selections[layer] = self._selections(heads, key_heads)

    def _selections(self, heads: int, key_heads: int) -> int:
        return heads if self.state.config.head_reduce == "none" else key_heads

    def finish(self, completed: bool) -> None:
        """It is over, or failed."""
        for each in (self, self.cross_attention):
            if each is not None:
                each.state.finish(completed)
                if each.trace is not None and completed:
                    each.trace.add(each.reads)
