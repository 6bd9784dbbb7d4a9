"""From a model type to its adapter: a table of modules imported on demand, then entry points of other packages."""

from __future__ import annotations

import difflib
import functools
import importlib
import os
import sys
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from gazepatch.errors import UnsupportedModelError

if TYPE_CHECKING:
    from gazepatch.adapters.base import Adapter

ENTRY_POINTS = "gazepatch.adapters"

MODULES = {
    "apertus1p5": "sized",
    "aria": "patterns",
    "aya_vision": "squares",
    "chameleon": "squares",
    "cohere2_vision": "squares",
    "cohere_compass": "thw",
    "cosmos3_edge": "thw",
    "cosmos3_omni": "thw",
    "deepseek_ocr2": "patterns",
    "deepseek_vl": "squares",
    "deepseek_vl_hybrid": "squares",
    "emu3": "sized",
    "ernie4_5_vl_moe": "thw",
    "exaone4_5": "thw",
    "fast_vlm": "squares",
    "fuyu": "patterns",
    "gemma3": "squares",
    "gemma3n": "squares",
    "gemma4": "sized",
    "gemma4_unified": "sized",
    "glm46v": "thw",
    "glm4v": "thw",
    "glm4v_moe": "thw",
    "glm_ocr": "thw",
    "glmga": "thw",
    "got_ocr2": "squares",
    "granite4_vision": "anyres",
    "granite_docling": "squares",
    "hunyuan_vl": "thw",
    "hyperclovax_vision_v2": "thw",
    "idefics2": "patterns",
    "idefics3": "squares",
    "inkling2": "thw",
    "inkling2_loop": "thw",
    "inkling_mm_model": "patterns",
    "internvl": "squares",
    "janus": "squares",
    "kimi_k25": "thw",
    "lfm2_vl": "sized",
    "lfm3_vl": "thw",
    "lighton_ocr": "sized",
    "llama4": "squares",
    "llava": "squares",
    "llava_next": "anyres",
    "llava_next_video": "anyres",
    "llava_onevision": "anyres",
    "minicpm_ocr": "sized",
    "minicpmv4_6": "sized",
    "minicpmv4_7": "sized",
    "minimax_m3_vl": "thw",
    "mistral3": "sized",
    "mllama": "cross",
    "molmo2": "sized",
    "muse_glimmer": "thw",
    "muse_spark": "thw",
    "nemotron_h_omni": "sized",
    "ovis2": "squares",
    "paddleocr_vl": "thw",
    "paligemma": "squares",
    "perception_lm": "squares",
    "pp_chart2table": "squares",
    "qianfan_ocr": "squares",
    "qwen2_5_omni_thinker": "thw",
    "qwen2_5_vl": "thw",
    "qwen2_vl": "thw",
    "qwen3_5": "thw",
    "qwen3_5_moe": "thw",
    "qwen3_omni_moe_thinker": "thw",
    "qwen3_vl": "thw",
    "qwen3_vl_moe": "thw",
    "shieldgemma2": "squares",
    "smolvlm": "squares",
    "step3p7": "sized",
    "unlimited_ocr": "sized",
    "video_llama_3": "thw",
    "video_llava": "squares",
    "vipllava": "squares",
}


def known_types() -> list[str]:
    """Model types with an adapter, built in or from another installed package."""
    return sorted({*MODULES, *(point.name for point in _installed())})


def adapter_for(model_type: str) -> Adapter:
    """The adapter of a model type.

    A built-in module defines `ADAPTERS`, a tuple of adapters. An entry point of group `gazepatch.adapters` is named
    after the model type and refers to an adapter.

    Raises:
        UnsupportedModelError: No adapter knows this type, or it cannot gaze.
    """
    for point in _installed():
        if point.name == model_type:
            return _checked(_loaded(point), model_type, _named(point))
    if model_type in MODULES:
        name = f"gazepatch.adapters.{MODULES[model_type]}"
        for adapter in importlib.import_module(name).ADAPTERS:
            if model_type in adapter.model_types:
                return _checked(adapter, model_type, name)
    refused: dict[str, str] = importlib.import_module("gazepatch.adapters.refused").REFUSED
    if model_type in refused:
        raise UnsupportedModelError(f"a model of type {model_type!r} cannot gaze: {refused[model_type]}")
    like = difflib.get_close_matches(model_type, known_types())
    raise UnsupportedModelError(
        f"no adapter for model type {model_type!r}{', only for ' * bool(like)}{', '.join(like)}: `gazepatch families` "
        "lists those that can gaze. To add one, subclass gazepatch.adapters.base.Adapter and name it under the entry "
        f"point group {ENTRY_POINTS!r}"
    )


def _installed() -> tuple[EntryPoint, ...]:
    """Adapters of other packages; looked for anew when something was installed, as every look reads all packages."""
    return _found(tuple((folder, _changed(folder)) for folder in sys.path))


@functools.lru_cache(maxsize=1)
def _found(_: tuple[tuple[str, int], ...]) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=ENTRY_POINTS))


def _changed(folder: str) -> int:
    """When something was put into a folder or taken from it, or 0 where there is none."""
    try:
        return os.stat(folder or ".").st_mtime_ns
    except OSError:
        return 0


def _loaded(point: EntryPoint) -> object:
    try:
        return point.load()
    except Exception as error:  # whatever an import can raise
        raise UnsupportedModelError(
            f"{_named(point)} cannot be loaded ({type(error).__name__}: {error}): repair or uninstall that package"
        ) from error


def _named(point: EntryPoint) -> str:
    package = f" of package {point.dist.name!r}" if point.dist else ""
    return f"entry point '{point.name} = {point.value}'{package}"


def _checked(adapter: object, model_type: str, source: str) -> Adapter:
    from gazepatch.adapters.base import Adapter

    if not isinstance(adapter, Adapter) or model_type not in adapter.model_types:
        raise UnsupportedModelError(
            f"{source} must be an instance of gazepatch.adapters.base.Adapter with {model_type!r} among its "
            f"model_types, got {adapter!r}"
        )
    return adapter
