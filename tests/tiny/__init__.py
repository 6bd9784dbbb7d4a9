"""Tiny vision-language models with random weights, and prompts for them, without any file from outside.

    case = tiny("qwen2_vl")                    # images
    case = tiny("qwen2_vl", video=True)        # videos, for the families in VIDEO
    pair = batch(case)                         # two rows, left-padded, with different numbers of images
    case.model.generate(**case.inputs, max_new_tokens=4)

`case.spans` is written down here by hand from what each family's processor does, not computed by an adapter. One module
a layout; a family is one function in its table. Those of Qwen and GLM lie beside the table of `grids`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from tiny import anyres, crossing, grids, recurrent, rows, runs, sized, squares, tiles
from tiny.models import VOCAB as VOCAB
from tiny.models import redraw
from tiny.models import text as text
from tiny.prompts import BOS, PAD, SPECIAL, Case, batch, filled, repeated
from tiny.prompts import BREAK as BREAK
from tiny.prompts import IMAGE as IMAGE
from tiny.prompts import VIDEO_TOKEN as VIDEO_TOKEN
from tiny.prompts import Media as Media

__all__ = ["CORE", "FAMILIES", "SHORT", "VARIANTS", "VIDEO", "batch", "built", "filled", "repeated", "tiny", "type_of"]

_MODULES = (anyres, crossing, grids, recurrent, rows, runs, sized, squares, tiles)

#: By name: what builds the case. A name is a model type, or one of `VARIANTS`.
FAMILIES: dict[str, Callable[[bool], Case]] = {
    name: build for module in _MODULES for name, build in sorted(module.FAMILIES.items())
}
VIDEO = tuple(name for module in _MODULES for name in module.VIDEO)
#: Other settings of a model type that has a name of its own.
VARIANTS = {
    "internvl_gpt_oss": "internvl",
    "llava_full": "llava",
    "llava_latent": "llava",
    "llava_looped": "llava",
    "llava_pixtral": "llava",
    "mistral3_latent": "mistral3",
    "paligemma_gemma2": "paligemma",
}
#: One family or two of every layout and every kind of decoder, for tests of many settings.
CORE = (
    "gemma3",
    "idefics3",
    "internvl",
    "kimi_k25",
    "llava",
    "llava_full",
    "llava_next",
    "llava_onevision",
    "llava_pixtral",
    "mistral3",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_vl",
)
#: What fails without a patch too, by version of transformers: outputs lack an entry that is asked for, and numbers of
#: frames are not handed on.
BROKEN = {"5.24.0": ("llama4",), "5.20.2": ("gemma4 with videos", "gemma4_unified with videos")}
#: Sliding windows that are shorter than an image.
SHORT: dict[str, Callable[[bool], Case]] = squares.SHORT | tiles.SHORT


def type_of(name: str) -> str:
    """The model type of a family or a variant."""
    return VARIANTS.get(name, name.removesuffix("_short"))


def tiny(name: str, video: bool = False, seed: int = 0) -> Case:
    """A tiny model of one of `FAMILIES` or `SHORT`, with a prompt of one row; skips a test that is too new for it."""
    if type_of(name) not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"transformers {transformers.__version__} does not have {type_of(name)} yet")
    if (what := type_of(name) + " with videos" * video) in BROKEN.get(transformers.__version__, ()):
        pytest.skip(f"transformers {transformers.__version__} itself cannot run {what}")
    torch.manual_seed(seed)
    if video and name not in VIDEO:
        raise ValueError(f"expected one of {', '.join(VIDEO)} for videos, got {name}")
    case = (FAMILIES | SHORT)[name](video)
    model = case.model.eval()
    redraw(model, torch.Generator().manual_seed(seed + 1))
    settings = model.generation_config
    settings.eos_token_id, settings.pad_token_id, settings.bos_token_id, settings.do_sample = None, PAD, BOS, False
    settings.suppress_tokens = list(SPECIAL)  # an answer holds no images
    return filled(case)


def built(name: str, video: bool = False) -> Case:
    """The same, made once: for tests that leave the model as it was."""
    return _built(name, video)


_built = functools.cache(tiny)
