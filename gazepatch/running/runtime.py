"""What is known of one patched model while it runs: facts that stay, and what each thread is doing with it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from torch import Tensor, nn

from gazepatch.adapters.base import Adapter
from gazepatch.caches.adoption import Layers
from gazepatch.config import GazeConfig
from gazepatch.counters import Counters, PromptReads
from gazepatch.errors import PatchError
from gazepatch.running.forward import Forward
from gazepatch.tracing import Trace
from gazepatch.uncompiled import uncompiled


class FeatureOrigin(NamedTuple):
    """Where some features come from: the `arguments` they were made from, and how many tokens they are for.

    `tokens` is 0 where nobody needs to know, or can.
    """

    arguments: dict[str, Any]
    tokens: int = 0


class Prefill(NamedTuple):
    """A prompt that `generate` cuts into pieces: its token `ids` `[B, S]`, and its `tokens` with those before it."""

    ids: Tensor
    tokens: int

    def rest(self, seen: int) -> Tensor:
        """The ids `[B, n]` that follow on so many tokens of the sequence."""
        return self.ids[:, self.ids.shape[1] - max(0, self.tokens - seen) :]


class FeatureOrigins:
    """The origin of features, as long as somebody keeps them."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[weakref.ref[Any], FeatureOrigin]] = {}

    @uncompiled
    def note(self, features: Any, origin: FeatureOrigin) -> None:
        """Remember that of some features, unless these are of a kind that Python has no weak references to."""
        key = id(features)
        with suppress(TypeError):
            self._held[key] = weakref.ref(features, lambda _: self._held.pop(key, None)), origin

    def of(self, features: Any) -> FeatureOrigin | None:
        """The origin of these features; None: not known."""
        kept, origin = self._held.get(id(features), (lambda: None, None))
        return origin if kept() is features else None


class Running(threading.local):
    """What one thread is doing with the model, so that two that generate with it do not see each other.

    Attributes:
        ids: Token ids that the multimodal model was called with.
        mask: Its padding mask `[B, S]`.
        encoded: Whether it was called with features that were made before.
        prefill: The prompt that is being read in pieces (`prefill_chunk_size`).
        captured: By modality, the origin of features, until a forward of the decoder takes them.
        capturing: Whether features are being made right now.
        origins: Those of features that somebody still keeps, who may give them to a forward later.
        dense: Blocks that are on, each of which lets the model read densely.
        forward: The running forward of the decoder.
        last_row: What stands for that of the mask over images, where somebody knows (`gazepatch.running.repeating`).
        latents: What the layer that runs makes its keys and values of (MLA).
        offset: What is added to its index, where it runs several times a token (`Adapter.cache_layers`).
        trace: Who wants to know what decode steps read.
        reads: Who wants to know what queries of prompts read.
        counters: Those of the cache that the thread used last.
    """

    def __init__(self) -> None:
        self.ids: Tensor | None = None
        self.mask: Tensor | None = None
        self.encoded = False
        self.prefill: Prefill | None = None
        self.captured: dict[str, FeatureOrigin] = {}
        self.capturing = False
        self.origins = FeatureOrigins()
        self.dense: set[object] = set()
        self.forward: Forward | None = None
        self.last_row: object | None = None
        self.latents: tuple[Tensor, Tensor] | None = None
        self.offset = 0
        self.trace: Trace | None = None
        self.reads: PromptReads | None = None
        self.counters: Counters | None = None


class Runtime:
    """One patched model.

    Args:
        adapter: Facts about the architecture.
        model_config: Configuration of the whole model.
        decoder: The text decoder. It is not kept.
        config: Settings.
        gaze_layers: Indices of the layers that gaze.

    Attributes:
        store_of: For every layer that reads the keys of another one: that layer.
        latent: Whether caches hold latents, a single key head for all query heads.
        stores: Layers whose entries are kept region by region, among those of the sequence.
        counters: Those of the cache that any thread used last.
        warned: Whether somebody was told that a prompt came without token ids.
    """

    def __init__(
        self, adapter: Adapter, model_config: Any, decoder: nn.Module, config: GazeConfig, gaze_layers: Sequence[int]
    ) -> None:
        self.adapter, self.model_config, self.config = adapter, model_config, config
        # Sets, wherever layers are looked up: torch.compile does not find a symbolic index in a tuple (torch 2.13).
        self.text_config = adapter.text_config(model_config)
        self.gaze_layers = frozenset(gaze_layers)
        self.flash = str(decoder.config._attn_implementation).startswith("flash")  # type: ignore[union-attr]
        self.store_of = adapter.store_layers(model_config)
        self.latent = adapter.latent(model_config)
        self.cross_layers = frozenset(adapter.cross_layers(model_config))
        self.stores = frozenset(self.store_of.get(layer, layer) for layer in gaze_layers) - self.cross_layers
        count = self.text_config.num_hidden_layers
        self.layers = Layers(
            count,
            tuple(sorted(self.stores)),
            tuple(sorted(self.cross_layers)),
            tuple(adapter.cache_layers(model_config)[count:]),
            self.latent,
        )
        self.counters = Counters()
        self.running = Running()
        self.warned = False

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise PatchError(
            "a patched model cannot be copied or pickled, because its undoing belongs to this one: "
            "call gazepatch.restore(model) first, then apply to both"
        )

    def record(self, forward: Forward, rows: int, prompt: bool, others: bool = False) -> None:
        """Start the counters and the trace anew with a prompt; go on with a decode step.

        A trace, which numbers the regions that a query sees, starts anew as well where it sees `others`.
        """
        state = forward.state
        if self.running.trace is not None:
            self.running.trace.follow(state, rows, prompt or others)
        self.counters = self.running.counters = state.counters
        if prompt:
            state.counters.clear()
        elif state.spans:
            state.counters.steps += 1
            if state.regions is None:
                state.count_whole()
            forward.trace = self.running.trace

    def record_step(self, forward: Forward, rows: int, others: bool = False) -> None:
        """`record` a step on a static cache, which has been counted."""
        self.counters = self.running.counters = forward.state.counters
        if self.running.trace is not None:
            self.running.trace.follow(forward.state, rows, others)
            forward.trace = self.running.trace if forward.state.spans else None
