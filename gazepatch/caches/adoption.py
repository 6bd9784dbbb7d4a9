"""A cache of transformers becomes a gaze cache: its layers are replaced, in place, while it is empty."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from gazepatch.caches.cross_attention import CrossLayer, CrossState, StaticCrossLayer, StaticCrossState
from gazepatch.caches.hybrid import HybridLayer
from gazepatch.caches.latents import LatentLayer, StaticLatentLayer
from gazepatch.caches.layer import GazeLayer
from gazepatch.caches.name import CACHE
from gazepatch.caches.state import GazeState
from gazepatch.caches.static import StaticGazeLayer, StaticState
from gazepatch.caches.window import WindowLayer
from gazepatch.config import GazeConfig
from gazepatch.errors import CacheError

#: Layers that a gaze layer can stand in for.
PLAIN = (DynamicLayer, LinearAttentionAndFullAttentionLayer)
#: What stands in for layers that hold the keys of images, with what they share.
CROSSING: dict[type, Any] = {
    DynamicLayer: (CrossState, CrossLayer),
    StaticLayer: (StaticCrossState, StaticCrossLayer),
}


@dataclass(frozen=True)
class Layers:
    """What the layers of a cache are to hold, by index.

    Attributes:
        count: How many there are, for caches that were made without a configuration.
        gaze: Layers whose entries are kept region by region.
        left: Layers that hold something else than the sequence, and stay as they are.
        copies: Layers that a decoder which runs some several times a token copies after all others, in that order.
        latent: Whether layers that gaze hold latents (MLA).
    """

    count: int
    gaze: tuple[int, ...]
    left: tuple[int, ...] = ()
    copies: tuple[int, ...] = ()
    latent: bool = False


def gaze_state(cache: object) -> GazeState | None:
    """The state of a cache that a patched model fills, or None for any other."""
    return getattr(cache, "gaze", None)


def stepping(cache: object, owner: object) -> StaticState | None:
    """The state of the owner's static cache, if it is ready for a decode step."""
    state = gaze_state(cache)
    if isinstance(state, StaticState) and state.ready and state.partial_prompt is None and state.owner() is owner:
        return state
    return None


def adopt(cache: object, owner: object, config: GazeConfig, layers: Layers) -> GazeState:
    """Make an empty `DynamicCache` or `StaticCache` a gaze cache; return the state of one that is the owner's already.

    Raises:
        CacheError: The cache is another patch's, holds entries, or is of a kind that cannot gaze.
    """
    state = gaze_state(cache)
    if state is None:
        state = _adopted(cache, owner, config, layers)
    elif state.owner() is not owner:
        raise CacheError(
            "this cache was filled by another model, or before the model was restored and patched again: "
            "start with a new cache"
        )
    state.take_settings(config)
    if isinstance(state, StaticState):
        state.catch_up()
    return state


def _adopted(cache: object, owner: object, config: GazeConfig, layers: Layers) -> GazeState:
    if not isinstance(cache, (DynamicCache, StaticCache)) or getattr(cache, "offloading", False):
        kind = "an offloaded cache" if getattr(cache, "offloading", False) else f"a {type(cache).__name__}"
        raise CacheError(
            f"a patched model needs transformers' plain DynamicCache or StaticCache, got {kind}: generate with "
            f"cache_implementation='dynamic' or 'static', or pass {CACHE}=DynamicCache()"
        )
    _check_empty(cache)
    if len(cache.layers) == layers.count:  # as the decoder would, once they were ours
        cache.layers += [copy.deepcopy(cache.layers[i]) for i in layers.copies]
    replace = _replace_static_layers if isinstance(cache, StaticCache) else _replace_layers
    state = replace(cache, owner, config, layers)
    cache.gaze = state  # type: ignore[union-attr]
    return state


def _check_empty(cache: Cache) -> None:
    # Layers that share the keys of another one, or are recurrent, do not know a length.
    held: list[Any] = [layer for layer in cache.layers if hasattr(layer, "get_seq_length")]
    if any(getattr(layer, "is_initialized", False) and layer.get_seq_length() > 0 for layer in held):
        raise CacheError(
            "this cache was filled by a model that was not patched: patch the model first, then start with a new cache"
        )


def _check_kinds(kinds: list[type], wanted: tuple[int, ...], fit: list[int]) -> None:
    if missing := sorted(set(wanted) - set(fit)):
        raise CacheError(
            f"layers {missing} were to gaze, but the cache keeps them as {[kinds[i].__name__ for i in missing]}: "
            f"generate with cache_implementation='dynamic', or pass {CACHE}=DynamicCache(config=model.config)"
        )


def _replace_layers(cache: Cache, owner: object, config: GazeConfig, layers: Layers) -> GazeState:
    # A cache made without a configuration has no layers yet: it would make plain ones as they are asked for.
    kinds = [type(layer) for layer in cache.layers] or [DynamicLayer] * (layers.count + len(layers.copies))
    plain = [i for i, kind in enumerate(kinds) if kind in PLAIN and i not in layers.left]
    _check_kinds(kinds, layers.gaze, plain)
    state = GazeState(owner, config)
    made = list(cache.layers) or [DynamicLayer() for _ in kinds]
    leader = next(iter(layers.gaze), plain[0] if plain else None)
    for i in plain:
        gazes, leads, layer = i in layers.gaze, i == leader, made[i]
        if isinstance(layer, LinearAttentionAndFullAttentionLayer):
            made[i] = HybridLayer(state, gazes, leads, layer.number_of_states)
        else:
            made[i] = (LatentLayer if gazes and layers.latent else GazeLayer)(state, gazes, leads)
    if config.context_tokens:
        for i, layer in enumerate(made):
            if type(layer) is DynamicSlidingWindowLayer:
                made[i] = WindowLayer(state, layer.sliding_window)
    for before, layer in zip(cache.layers, made, strict=False):
        if getattr(before, "record_past", False):  # assisted generation asks for it before the first forward
            layer.record_past = True  # type: ignore[union-attr]
    state.follows = not isinstance(made[0], GazeLayer)
    cache.layers[:] = made
    return state


def _replace_static_layers(cache: Cache, owner: object, config: GazeConfig, layers: Layers) -> StaticState:
    kinds: list[type] = [type(layer) for layer in cache.layers]
    plain = [i for i, kind in enumerate(kinds) if kind is StaticLayer and i not in layers.left]
    _check_kinds(kinds, layers.gaze, plain)
    if config.context_tokens and StaticSlidingWindowLayer in kinds:
        raise CacheError(
            "a static cache has no room for context tokens in the sliding windows of this model: generate with "
            "cache_implementation='dynamic'"
        )
    gaze = layers.gaze or plain[:1]  # where none gazes (images are keys of others), one is there to count the tokens
    leader = gaze[0]
    state = StaticState(owner, config, cache.layers[leader].get_max_length())
    state.follows = leader > 0
    # Others stay as they are, unless context tokens lengthen them.
    for i in plain if config.context_tokens else gaze:
        gazes = i in layers.gaze
        cache.layers[i] = (StaticLatentLayer if gazes and layers.latent else StaticGazeLayer)(state, gazes, i == leader)
    return state


def state_of_images(
    cache: Cache | None, owner: object, config: GazeConfig, layers: Sequence[int], gaze_layers: Collection[int]
) -> CrossState:
    """What the cross-attention `layers` of a cache share; they are made ready in place when the cache is new.

    Raises:
        CacheError: They are of a kind that cannot gaze.
    """
    if cache is None:
        return CrossState(owner, config)
    held = [cache.layers[i] for i in layers]
    if isinstance(first := held[0], CrossLayer):
        assert isinstance(first.state, CrossState)
        first.state.take_settings(config)
        return first.state
    kinds = {type(layer) for layer in held}
    if len(kinds) > 1 or not kinds <= CROSSING.keys():
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise CacheError(f"expected layers of one kind, dynamic or static, got {names}: start with a new cache")
    of_state, of_layers = CROSSING[type(first)]
    state: CrossState = of_state(owner, config)
    for i in layers:
        cache.layers[i] = of_layers(state, i in gaze_layers, i == layers[0])
    return state
