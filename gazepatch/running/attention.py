"""The attention and mask functions that a patched decoder calls in place of its own.

They are registered with transformers under a name of the patched model's own, and fall back to the implementation that
the model had, with its own mask, wherever nothing gazes: same arithmetic, same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    and_masks,
    packed_sequence_mask_function,
)
from transformers.modeling_utils import AttentionInterface

from gazepatch.caches.latents import LatentLayer
from gazepatch.caches.layer import GazeLayer
from gazepatch.caches.static import StaticState
from gazepatch.running.arguments import refuse_unsupported, scores_of, tempered
from gazepatch.running.call import Attended, Call, implementation
from gazepatch.running.checkpointing import handed_on
from gazepatch.running.forward import Forward
from gazepatch.running.masks import as_4d, block_mask, by_position, of_keys
from gazepatch.running.prompt import gaze, see_own_image
from gazepatch.running.runtime import Runtime
from gazepatch.score_mod import ScoreMod
from gazepatch.uncompiled import uncompiled

#: Of the names under which transformers knows patched attention: free of the words that it looks for in names.
PREFIX = "gazepatch_"


class GazeAttention:
    """Attention of one patched model. `original` is the name of the implementation that it had."""

    def __init__(self, runtime: Runtime, original: str) -> None:
        self.runtime, self.original = runtime, original
        self.name = f"{PREFIX}{id(self):x}"  # unique among living models

    def register(self) -> None:
        """Make the functions known to transformers."""
        AttentionInterface.register(self.name, self.attend)
        AttentionMaskInterface.register(self.name, self.mask)

    def mask(self, *args: Any, **kwargs: Any) -> Any:
        """The mask that the original implementation would get."""
        forward = self.runtime.running.forward
        if forward is not None and forward.state.slots.inserted:
            visible, packed = kwargs["mask_function"], forward.documents
            if kwargs.get("local_size") is not None:
                position, context = forward.state.every_slot(torch.device(kwargs.get("device", "cpu")))
                visible = by_position(visible, position if packed is None else packed.position, context)
            if packed is not None:
                visible = and_masks(visible, packed_sequence_mask_function(packed.number))
                kwargs["allow_is_causal_skip"] = False
            kwargs["mask_function"] = visible
        return ALL_MASK_ATTENTION_FUNCTIONS[self.original](*args, **kwargs)

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> Attended:
        """Attention of `query` `[B, H, S, D]`, as transformers calls it; returns `[B, S, H, D_v]` and no weights."""
        if kwargs.get("block_indices") is not None and self.original in ("sdpa", "eager"):
            attention_mask = block_mask(module, query, key, attention_mask, **kwargs)
        running = self.runtime.running
        latents, running.latents = running.latents, None
        forward = handed_on(module, kwargs, running.forward)
        if forward is None or forward.plain:
            return self.dense(module, query, key, value, attention_mask, **kwargs)
        if forward.state.slots.inserted and getattr(module, "attn_temperature_tuning", False) and not module.use_rope:
            query = tempered(module, query, forward)
        layer = -1 if (index := getattr(module, "layer_idx", None)) is None else index + running.offset
        call = Call(module, layer, query, key, value, attention_mask, kwargs, latents)
        if isinstance(forward.state, StaticState) and forward.state.ready:
            return self.within_forward(forward, call)
        return self.outside_graphs(forward, call)

    def within_forward(self, forward: Forward, call: Call) -> Attended:
        """`attend` within a forward of the decoder."""
        layer = call.layer
        if forward.cross_attention is not None and layer in self.runtime.cross_layers:
            forward = forward.cross_attention
        if forward.state.decoding and layer in self.runtime.gaze_layers:
            refuse_unsupported(call.options)
            score_mod = scores_of(self.original, call.query, call.options)
            return self.decode(forward, layer, call.module, call.query, score_mod, call.mask), None
        return self.read(forward, layer, call)

    outside_graphs = uncompiled(within_forward)

    def dense(self, module: nn.Module, *args: Any, **kwargs: Any) -> Attended:
        """The model's own attention."""
        return implementation(self.original, module)(module, *args, **kwargs)

    def decode(
        self, forward: Forward, layer: int, module: Any, query: Tensor, score_mod: ScoreMod, mask: Any
    ) -> Tensor:
        """One routed step of one layer: `query` `[B, H, 1, D]` gives `[B, 1, H, D_v]`."""
        store, state = forward.layer(self.runtime.store_of.get(layer, layer)), forward.state
        pending = store.take_pending()
        expansion = store.expansion(module.expand_kv) if isinstance(store, LatentLayer) else None
        query = query if expansion is None else expansion.absorbed(query)
        entries = store.entries()
        plan, score_mod = state.plan(query, entries), state.laid(score_mod)
        total = state.counters.on_device(layer, query.device) if plan.counts_itself else None
        decoded = plan.decode(query, entries, score_mod, forward.bias(as_4d(mask), query.device), total, pending)
        forward.count(layer, query.shape[1], entries.key.shape[1], plan.visual_entries, decoded.read)
        if forward.trace is not None:
            forward.reads[layer] = None if decoded.selected is None else plan.numbers(decoded.selected)
        output = decoded.output if expansion is None else expansion.expanded(decoded.output)
        return output.transpose(1, 2)

    def expect(self, state: StaticState, store: GazeLayer, layer: int, call: Call) -> None:
        """A prompt on a static cache: have ready what the layer's steps will need."""
        query, key_heads, value_dim = call.query, call.key.shape[1], call.value.shape[3]
        if isinstance(store, LatentLayer):
            key_heads = 1
            if state.regions is not None:
                with torch.no_grad():  # what steps use is kept, and keeps no graph
                    query = store.expansion(call.module.expand_kv).absorbed(query[:, :, :0])
                value_dim = query.shape[3]
        state.expect(layer, query, key_heads, value_dim)

    def read(self, forward: Forward, layer: int, call: Call) -> Attended:
        """Anything but a routed step: the model's own attention, and some queries of a prompt again after it."""
        gazes, store = layer in self.runtime.gaze_layers, self.runtime.store_of.get(layer, layer)
        if forward.state.decoding and store in self.runtime.stores:  # the layer it shares keys with did not return all
            call.key, call.value = forward.layer(store).logical()
        call.mask = of_keys(call.mask, call.key)
        if gazes and forward.trace is not None:
            forward.reads[layer] = None
        if gazes and isinstance(forward.state, StaticState):
            self.expect(forward.state, forward.layer(store), layer, call)
        elif gazes:
            forward.expect_whole(layer, call.query.shape[1], 1 if self.runtime.latent else call.key.shape[1])
        if forward.insertion is not None:
            # Context tokens repeat positions, which flash attention would take for the borders of packed sequences.
            call.options["position_ids"] = None
        output, weights = self.dense(call.module, call.query, call.key, call.value, call.mask, **call.options)
        if forward.insertion is not None:
            output = see_own_image(call, forward.own_image(forward.insertion, call.query.device), self.original, output)
        if gazes and forward.routed is not None:
            refuse_unsupported(call.options)
            score_mod = scores_of(self.original, call.query, call.options)
            output = gaze(call, score_mod, forward, store, output, self.runtime.running.reads)
        return output, weights


def unregister(name: str) -> None:
    """Take a patched model's functions out of transformers' registries, which offer no call for it."""
    AttentionInterface._global_mapping.pop(name, None)
    AttentionMaskInterface._global_mapping.pop(name, None)
