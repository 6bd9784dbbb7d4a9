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

from gazepatch.caches.latents import Expansion, LatentLayer
from gazepatch.caches.layer import GazeLayer
from gazepatch.caches.static import StaticState
from gazepatch.errors import UnsupportedModelError
from gazepatch.forward import OF_FORWARD, Forward, Runtime
from gazepatch.insertion import OwnImage
from gazepatch.ops.prefill import gaze_prefill
from gazepatch.scores import Scores

Attended = tuple[Tensor, Tensor | None]
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

#: Attention arguments that pick the keys already.
UNSUPPORTED = ("indices", "block_indices")


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
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> Attended:
        """Attention of `query` `[B, H, S, D]`, as transformers calls it; returns `[B, S, H, D_v]` and no weights."""
        if kwargs.get("block_indices") is not None and self.original in ("sdpa", "eager"):
            attention_mask = _block_mask(module, query, key, attention_mask, **kwargs)
        running = self.runtime.running
        latents, running.latents = running.latents, None
        forward: Forward | None = kwargs.pop(OF_FORWARD, None) or running.forward
        if forward is None:
            return self.dense(module, query, key, value, attention_mask, **kwargs)
        if forward.state.slots.inserted and getattr(module, "attn_temperature_tuning", False) and not module.use_rope:
            query = _tempered(module, query, forward)
        layer = getattr(module, "layer_idx", -1)
        if forward.across is not None and layer in self.runtime.cross_layers:
            forward = forward.across
        gazes, store = layer in self.runtime.gaze_layers, self.runtime.store_of.get(layer, layer)
        if gazes and forward.state.decoding:
            _refuse_unsupported(kwargs)
            return self.decode(forward, layer, module, query, self._scores(query, kwargs), attention_mask), None
        if forward.state.decoding and store in self.runtime.stores:  # the layer it shares keys with did not return all
            key, value = _layer(forward, store).logical()
        attention_mask = _of_keys(attention_mask, key)
        if gazes and isinstance(forward.state, StaticState):
            forward.state.expect(layer, query, key, value)
        elif gazes and forward.state.spans and forward.tokens == 1 and forward.state.regions is None:
            forward.count_whole(layer, query.shape[1], 1 if self.runtime.latent else key.shape[1])
        if forward.insertion is not None:
            # Context tokens repeat positions, which flash attention would take for the borders of packed sequences.
            kwargs["position_ids"] = None
        output, weights = self.dense(module, query, key, value, attention_mask, **kwargs)
        if (own := forward.own_image(query.device)) is not None:
            output = self._own_image(own, module, query, key, value, attention_mask, output, **kwargs)
        if gazes and forward.routed is not None:
            _refuse_unsupported(kwargs)
            scores, expansion = self._scores(query, kwargs), None
            if latents is not None:  # read as decode steps read them, so that the same regions are selected
                expansion = Expansion.of(module.expand_kv, *latents)
                key = value = torch.cat(latents, 3)
            output = self._prefill(forward, layer, query, key, value, scores, expansion, attention_mask, output)
        return output, weights

    def dense(self, module: nn.Module, *args: Any, **kwargs: Any) -> Attended:
        """The model's own attention."""
        attended: Attended = _implementation(self.original, module)(module, *args, **kwargs)
        return attended

    def decode(self, forward: Forward, layer: int, module: Any, query: Tensor, scores: Scores, mask: Any) -> Tensor:
        """One routed step of one layer: `query` `[B, H, 1, D]` gives `[B, 1, H, D_v]`."""
        store, state = _layer(forward, self.runtime.store_of.get(layer, layer)), forward.state
        expansion = store.expansion(module.expand_kv) if isinstance(store, LatentLayer) else None
        query = query if expansion is None else expansion.absorbed(query)
        entries = store.entries()
        plan, scores = state.plan(query, entries), state.laid(scores)
        total = state.counters.on_device(layer, query.device) if plan.counts_itself else None
        decoded = plan.decode(query, entries, scores, forward.bias(_as_4d(mask), query.device), total)
        forward.count(layer, query.shape[1], entries.key.shape[1], plan.visual_entries, decoded.read)
        if forward.trace is not None:
            forward.reads[layer] = None if decoded.selected is None else plan.numbers(decoded.selected)
        output = decoded.output if expansion is None else expansion.expanded(decoded.output)
        return output.transpose(1, 2)

    def _scores(self, query: Tensor, kwargs: dict[str, Any]) -> Scores:
        """What the model's own implementation makes of dot products: sdpa knows neither soft caps nor sinks."""
        scaling = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        softcap, sinks, bias = (kwargs.get(name) for name in ("softcap", "s_aux", "position_bias"))
        if sinks is not None:
            sinks = sinks.view(1, -1, 1)
        elif (of_queries := kwargs.get("sinks")) is not None:  # [B, H, Q, 1]
            sinks = of_queries[..., 0]
        return Scores(scale, None, None, bias) if self.original == "sdpa" else Scores(scale, softcap, sinks, bias)

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
        # Flash attention takes no mask, and sdpa no more than dot products.
        more = self.original != "sdpa" and any(kwargs.get(name) is not None for name in ("softcap", "s_aux"))
        name = "eager" if more or self.original == "eager" else "sdpa"
        if name == "eager":
            visible = torch.where(visible, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
        queries, attended = query.index_select(2, own.columns), _implementation(name, module)
        output, _ = attended(module, queries, key[:, :, -new:], value[:, :, -new:], visible, **kwargs)
        return _replaced(dense, own.columns, own.rows, output)

    def _prefill(
        self,
        forward: Forward,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scores: Scores,
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
            state.laid(scores).of_queries(columns),
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


def _implementation(name: str, module: nn.Module) -> Callable[..., Attended]:
    # Eager attention is not registered anywhere: each modelling file has its own.
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    implementation: Callable[..., Attended] = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    return implementation


def _replaced(dense: Tensor, columns: Tensor, rows: Tensor, output: Tensor) -> Tensor:
    """`dense` `[B, S, H, D_v]` with `output` `[B, Q, H, D_v]` in the columns `[Q]` of the rows `[B, Q]`."""
    kept = dense.index_select(1, columns)
    return dense.index_copy(1, columns, torch.where(rows[..., None, None], output, kept))


def _by_position(visible: MaskFunction, position: Tensor, context: Tensor) -> MaskFunction:
    """A mask function of positions as one of slots: local windows and chunks are as long as without context tokens."""
    # Chunks are counted behind the padding of a row, which in slots is more by those in front that stand for nothing.
    position = position + (position < 0).long().cumprod(-1).sum(-1, keepdim=True)

    def of_slots(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = visible(batch, head, position[batch, query], position[batch, key])
        return seen & ((key <= query) | ~context[batch, key])

    return of_slots


def _tempered(module: Any, query: Tensor, forward: Forward) -> Tensor:
    """`query` `[B, H, S, D]`, which Llama 4 has sharpened by slot where it has no rotary embedding, by position."""
    new = slice(forward.past, forward.past + query.shape[2])
    positions, _ = forward.state.every_slot(query.device)

    def factor(at: Tensor) -> Tensor:
        sharpened: Tensor = torch.log1p(torch.floor((at.float() + 1.0) / module.floor_scale)) * module.attn_scale + 1.0
        return sharpened

    slots = torch.arange(new.start, new.stop, device=query.device)
    ratio = factor(positions[:, new].clamp(min=0)) / factor(slots)
    return (query * ratio[:, None, :, None]).to(query.dtype)


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


def _of_keys(mask: Any, key: Tensor) -> Any:
    """A mask without the columns of room that a static cache has, but does not give to the attention of a prompt."""
    wider = isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[3] > key.shape[2]
    return mask[..., : key.shape[2]] if wider else mask


def _refuse_unsupported(kwargs: dict[str, Any]) -> None:
    if present := [name for name in UNSUPPORTED if kwargs.get(name) is not None]:
        raise UnsupportedModelError(
            f"this model's attention uses {', '.join(present)}, which gaze attention does not honour: "
            "name the layers in dense_layers"
        )
