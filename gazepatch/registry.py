"""From a model type to its adapter: a table of modules imported on demand, then entry points of other packages."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from gazepatch.errors import UnsupportedModelError

if TYPE_CHECKING:
    from gazepatch.adapters.base import Adapter

ENTRY_POINTS = "gazepatch.adapters"

MODULES = {
    "gemma3": "gemma3",
    "idefics3": "idefics3",
    "internvl": "internvl",
    "llava": "llava",
    "llava_next": "llava_next",
    "llava_onevision": "llava_next",
    "mistral3": "mistral3",
    "qwen2_5_vl": "qwen_vl",
    "qwen2_vl": "qwen_vl",
    "qwen3_vl": "qwen_vl",
    "smolvlm": "idefics3",
    "vipllava": "llava",
}


def known_types() -> list[str]:
    """Model types with an adapter, built in or from another installed package."""
    return sorted({*MODULES, *(point.name for point in entry_points(group=ENTRY_POINTS))})


def adapter_for(model_type: str) -> Adapter:
    """The adapter of a model type.

    A built-in module defines `ADAPTERS`, a tuple of adapters. An entry point of group `gazepatch.adapters` is named
    after the model type and refers to an adapter.

    Raises:
        UnsupportedModelError: No adapter knows this type.
    """
    for point in entry_points(group=ENTRY_POINTS, name=model_type):
        return _checked(point.load(), model_type, f"entry point {point.value}")
    if model_type in MODULES:
        name = f"gazepatch.adapters.{MODULES[model_type]}"
        for adapter in importlib.import_module(name).ADAPTERS:
            if model_type in adapter.model_types:
                return _checked(adapter, model_type, name)
    raise UnsupportedModelError(
        f"no adapter for model type {model_type!r}; known: {', '.join(known_types())}. "
        f"To add one, subclass gazepatch.adapters.base.Adapter and name it under the entry point group {ENTRY_POINTS!r}"
    )


def _checked(adapter: object, model_type: str, source: str) -> Adapter:
    from gazepatch.adapters.base import Adapter

    if not isinstance(adapter, Adapter) or model_type not in adapter.model_types:
        raise UnsupportedModelError(
            f"{source} must be an instance of gazepatch.adapters.base.Adapter whose model_types include {model_type!r}, "
            f"got {adapter!r}"
        )
    return adapter
