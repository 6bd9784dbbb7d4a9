"""The attention and mask functions that a patched decoder calls in place of its own.

They are registered with transformers under a name of the patched model's own, and fall back to the implementation that
the model had, with its own mask, wherever nothing gazes: same arithmetic, same bits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from gazepatch.cache import GazeLayer
from gazepatch.errors import UnsupportedModelError
from gazepatch.forward import OF_FORWARD, Forward, Runtime
from gazepatch.insertion import OwnImage
from gazepatch.latents import Expansion, LatentLayer
from gazepatch.ops.prefill import gaze_prefill

Attended = tuple[Tensor, Tensor | None]
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

#: Attention arguments that add to the scores what window descriptors do not know of.
UNSUPPORTED = ("softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices")


class GazeAttention:
    """Attention of one patched model. `original` is the name of the implementation that it had."""

    def __init__(self, runtime: Runtime, original: str) -> None:
        self.runtime, self.original = runtime, original
        #: Unique among living models, and free of the words that transformers looks for in a name.
        self.name = f"gazepatch_{id(self):x}"

    def register(self) -> None:
        """Make the functions known to transformers."""
        AttentionInterface.register(self.name, self.attend)
        AttentionMaskInterface.register(self.name, self.mask)

    def mask(self, *args: Any, **kwargs: Any) -> Any:
        """The mask that the original implementation would get."""
        forward = self.runtime.running.forward
        if forward is not None and forward.state.slots.inserted and kwargs.get("local_size") is not None:
            device = torch.device(kwargs.get("device", "cpu"))
            kwargs["mask_function"] = _by_position(kwargs["mask_function"], *forward.state.every_slot(device))
        return ALL_MASK_ATTENTION_FUNCTIONS[self.original](*args, **kwargs)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> Attended:
        """Attention of `query` `[B, H, S, D]`, as transformers calls it; returns `[B, S, H, D_v]` and no weights."""
        if kwargs.get("block_indices") is not None and self.original in ("sdpa", "eager"):
            attention_mask = _block_mask(module, query, key, attention_mask, **kwargs)
        running = self.runtime.running
        latents, running.latents = running.latents, None
        forward: Forward | None = kwargs.pop(OF_FORWARD, None) or running.forward
        if forward is None:
            return self.dense(module, query, key, value, attention_mask, **kwargs)
        layer = getattr(module, "layer_idx", -1)
        gazes, store = layer in self.runtime.gaze_layers, self.runtime.store_of.get(layer, layer)
        if gazes and forward.state.decoding:
            _refuse_unsupported(kwargs)
            return self.decode(forward, layer, module, query, _scale(query, kwargs), attention_mask), None
        if forward.state.decoding and store in self.runtime.stores:  # the layer it shares keys with did not return all
            key, value = _layer(forward, store).logical()
        if gazes and forward.state.spans and forward.tokens == 1:
            forward.count_whole(layer, query.shape[1], 1 if self.runtime.latent else key.shape[1])
        if forward.insertion is not None:
            # Context tokens repeat positions, which flash attention would take for the borders of packed sequences.
            kwargs["position_ids"] = None
        output, weights = self.dense(module, query, key, value, attention_mask, **kwargs)
        if (own := forward.own_image(query.device)) is not None:
            output = self._own_image(own, module, query, key, value, attention_mask, output, **kwargs)
        if gazes and forward.routed is not None:
            _refuse_unsupported(kwargs)
            scale, expansion = _scale(query, kwargs), None
            if latents is not None:  # read as decode steps read them, so that the same regions are selected
                expand: Any = module.expand_kv
                expansion = Expansion.of(expand, *latents)
                key = value = torch.cat(latents, 3)
            output = self._prefill(forward, layer, query, key, value, scale, expansion, attention_mask, output)
        return output, weights

    def dense(self, module: nn.Module, *args: Any, **kwargs: Any) -> Attended:
        """The model's own attention."""
        # Eager attention is not registered anywhere: each modelling file has its own.
        eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        attended: Attended = ALL_ATTENTION_FUNCTIONS.get_interface(self.original, eager)(module, *args, **kwargs)
        return attended

    def decode(self, forward: Forward, layer: int, module: Any, query: Tensor, scale: float, mask: Any) -> Tensor:
        """One routed step of one layer: `query` `[B, H, 1, D]` gives `[B, 1, H, D_v]`."""
        store, state = _layer(forward, self.runtime.store_of.get(layer, layer)), forward.state
        expansion = store.expansion(module.expand_kv) if isinstance(store, LatentLayer) else None
        query = query if expansion is None else expansion.absorbed(query)
        entries = store.entries()
        plan = state.plan(query, entries)
        total = state.counters.on_device(layer, query.device) if plan.counts_itself else None
        decoded = plan.decode(query, entries, scale, forward.bias(_as_4d(mask), query.device), total)
        forward.count(layer, query.shape[1], entries.key.shape[1], plan.visual_entries, decoded.read)
        if forward.trace is not None:
            forward.reads[layer] = None if decoded.selected is None else plan.numbers(decoded.selected)
        output = decoded.output if expansion is None else expansion.expanded(decoded.output)
        return output.transpose(1, 2)

    def _own_image(
        self,
        own: OwnImage,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        dense: Tensor,
        **kwargs: Any,
    ) -> Tensor:
        """`dense` with the queries of context tokens done again, over the keys of their own image alone."""
        visible, new = own.visible, query.shape[2]
        if torch.is_tensor(mask) and mask.dim() == 4:  # a sliding window may hide some of the image
            of_queries = mask[..., -new:].index_select(2, own.columns)
            visible = (visible & of_queries) if mask.dtype == torch.bool else (visible & (of_queries == 0))
        if self.original == "eager":
            visible = torch.where(visible, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
        attended = ALL_ATTENTION_FUNCTIONS["sdpa"] if self.original != "eager" else self.dense
        queries = query.index_select(2, own.columns)
        output, _ = attended(module, queries, key[:, :, -new:], value[:, :, -new:], visible, **kwargs)
        return _replaced(dense, own.columns, own.rows, output)

    def _prefill(
        self,
        forward: Forward,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        expansion: Expansion | None,
        mask: Any,
        dense: Tensor,
    ) -> Tensor:
        state, device = forward.state, query.device
        assert forward.routed is not None and forward.routed_rows is not None
        columns, rows = forward.routed.to(device), forward.routed_rows.to(device)
        mask = _as_4d(mask)
        dropped = forward.tokens - query.shape[2]  # a layer may do without the queries that no logits are asked for
        if dropped:
            kept = (columns >= dropped).nonzero()[:, 0]
            columns, rows = columns[kept] - dropped, rows[:, kept]
            if not len(columns):
                return dense
        first = forward.past + dropped
        if mask is not None and mask.shape[2] == 1 < query.shape[2]:  # padding only, as for flash attention
            mask = mask & (torch.arange(key.shape[2], device=device) <= (columns + first)[:, None])
        elif mask is not None:
            mask = mask.index_select(2, columns)
        routed = query.index_select(2, columns)
        gazed = gaze_prefill(
            routed if expansion is None else expansion.absorbed(routed),
            key,
            value,
            self._means(forward, layer, key, value),
            state.table("regions", device),
            state.table("region_of", device),
            columns + first,
            mask,
            self.runtime.config,
            scale,
        )
        gazed = gazed if expansion is None else expansion.expanded(gazed)
        return _replaced(dense, columns, rows, gazed.transpose(1, 2))

    def _means(self, forward: Forward, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        """Means of the windows: as cached, or made here when the forward keeps no cache."""
        if forward.cache is not None:
            store = _layer(forward, self.runtime.store_of.get(layer, layer))
            assert store.mean_keys is not None
            return store.mean_keys, store.mean_values
        chunk = forward.state.table("chunk", key.device)
        keys = chunk.means(chunk.visual_entries(key))
        if not self.runtime.config.periphery:
            return keys, None
        return keys, chunk.means(chunk.visual_entries(value))


def unregister(name: str) -> None:
    """Take a patched model's functions out of transformers' registries, which offer no call for it."""
    AttentionInterface._global_mapping.pop(name, None)
    AttentionMaskInterface._global_mapping.pop(name, None)


def _replaced(dense: Tensor, columns: Tensor, rows: Tensor, output: Tensor) -> Tensor:
    """`dense` `[B, S, H, D_v]` with `output` `[B, Q, H, D_v]` in the columns `[Q]` of the rows `[B, Q]`."""
    kept = dense.index_select(1, columns)
    return dense.index_copy(1, columns, torch.where(rows[..., None, None], output, kept))


def _by_position(visible: MaskFunction, position: Tensor, context: Tensor) -> MaskFunction:
    """A mask function of positions as one of slots: a local window is as long as it was without context tokens."""

    def of_slots(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = visible(batch, head, position[batch, query], position[batch, key])
        return seen & ((key <= query) | ~context[batch, key])

    return of_slots


def _layer(forward: Forward, layer: int) -> GazeLayer:
    assert forward.cache is not None
    store = forward.cache.layers[layer]
    assert isinstance(store, GazeLayer)
    return store


def _block_mask(
    module: Any,
    query: Tensor,
    key: Tensor,
    mask: Any,
    block_indices: Tensor,
    position_ids: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """The mask of block-sparse layers (MiniMax M3), which they make themselves only for implementations they know."""
    if position_ids is None:
        position_ids = torch.arange(key.shape[2] - query.shape[2], key.shape[2], device=query.device)
    positions = position_ids.expand(len(query), -1)
    made: Tensor = module.indexer.build_block_mask(
        block_indices, mask, key.shape[2], query.dtype, query.device, positions
    )
    return made


def _scale(query: Tensor, kwargs: dict[str, Any]) -> float:
    scaling = kwargs.get("scaling")
    return query.shape[-1] ** -0.5 if scaling is None else float(scaling)


def _as_4d(mask: Any) -> Tensor | None:
    """A mask `[B, 1, S, L]`, whichever form the original implementation takes."""
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.dim() == 4:
        return mask
    if torch.is_tensor(mask) and mask.dim() == 2:  # flash attention: padding only
        return mask.bool()[:, None, None]
    raise UnsupportedModelError(
        f"expected an attention mask that is a tensor, got {type(mask).__name__}: "
        "load the model with attn_implementation='sdpa' before patching it"
    )


def _refuse_unsupported(kwargs: dict[str, Any]) -> None:
    if present := [name for name in UNSUPPORTED if kwargs.get(name) is not None]:
        raise UnsupportedModelError(
            f"this model's attention uses {', '.join(present)}, which gaze attention does not honour: "
            "name the layers in dense_layers"
        )
