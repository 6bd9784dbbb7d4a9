"""Which layers of a model gaze, from its configuration alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gazepatch.config import GazeConfig
from gazepatch.errors import ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    from gazepatch.adapters.base import Adapter


def dense_reasons(adapter: Adapter, model_config: Any, config: GazeConfig) -> dict[int, str | None]:
    """Why a layer does not gaze under these settings, by number in a cache (`Adapter.cache_layers`); None: it gazes."""
    reasons = dict(adapter.dense_reasons(model_config))
    for layer in config.dense_layers:
        reasons.setdefault(layer, "named in dense_layers")
    for layer, store in adapter.store_layers(model_config).items():
        if store in reasons:
            reasons.setdefault(layer, f"reads the keys of layer {store}, which stays dense")
    return {number: reasons.get(layer) for number, layer in enumerate(adapter.cache_layers(model_config))}


def gaze_layers(adapter: Adapter, model_config: Any, config: GazeConfig) -> tuple[int, ...]:
    """Layers that gaze under these settings: those without a reason not to.

    Raises:
        ConfigError: `dense_layers` names a layer that the model does not have.
        UnsupportedModelError: None is left.
    """
    count = adapter.text_config(model_config).num_hidden_layers
    if unknown := [i for i in config.dense_layers if i >= count]:
        raise ConfigError(f"dense_layers must be below {count}, the model's number of layers, got {unknown}")
    reasons = dense_reasons(adapter, model_config, config)
    layers = tuple(number for number, reason in reasons.items() if reason is None)
    if not layers:
        why = "; ".join(sorted(set(adapter.dense_reasons(model_config).values()))) or "dense_layers names them all"
        raise UnsupportedModelError(f"none of the {count} layers of this {model_config.model_type} can gaze: {why}")
    return layers
