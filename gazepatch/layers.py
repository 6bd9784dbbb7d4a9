"""Which layers of a model gaze, from its configuration alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gazepatch.config import GazeConfig
from gazepatch.errors import ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    from gazepatch.adapters.base import Adapter


def gaze_layers(adapter: Adapter, model_config: Any, config: GazeConfig) -> tuple[int, ...]:
    """Layers that gaze under these settings, by the numbers that a cache has for them (`Adapter.runs`).

    Raises:
        ConfigError: `dense_layers` names a layer that the model does not have.
        UnsupportedModelError: None is left.
    """
    count = adapter.text_config(model_config).num_hidden_layers
    if unknown := [i for i in config.dense_layers if i >= count]:
        raise ConfigError(f"dense_layers must be below {count}, the model's number of layers, got {unknown}")
    reasons = adapter.dense_reasons(model_config)
    dense, store_of = {*reasons, *config.dense_layers}, adapter.store_layers(model_config)
    runs = enumerate(adapter.runs(model_config))
    layers = tuple(i for i, layer in runs if layer not in dense and store_of.get(layer, layer) not in dense)
    if not layers:
        why = "; ".join(sorted(set(reasons.values()))) or "dense_layers names them all"
        raise UnsupportedModelError(f"none of the {count} layers of this {model_config.model_type} can gaze: {why}")
    return layers
