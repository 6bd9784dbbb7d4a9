"""Text decoders with recurrent or convolutional layers between those of full attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from tiny.grids import DEEP, EXPERTS, MARKS, MROPE, grids
from tiny.models import text
from tiny.prompts import Case

LINEAR: dict[str, Any] = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
    "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0},
}
SHALLOW = {name: value for name, value in DEEP.items() if name != "deepstack_visual_indexes"}


def qwen3_5(video: bool) -> Case:
    decoder = text(transformers.Qwen3_5TextConfig, **LINEAR)
    config = transformers.Qwen3_5Config(vision_config=SHALLOW, text_config=decoder, **MARKS)
    return grids(transformers.Qwen3_5ForConditionalGeneration(config), video, apart=True)


def qwen3_5_moe(video: bool) -> Case:
    experts = {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 32}
    decoder = text(transformers.Qwen3_5MoeTextConfig, **LINEAR, **experts)
    config = transformers.Qwen3_5MoeConfig(vision_config=SHALLOW, text_config=decoder, **MARKS)
    return grids(transformers.Qwen3_5MoeForConditionalGeneration(config), video, apart=True)


FAMILIES: dict[str, Callable[[bool], Case]] = {"qwen3_5": qwen3_5, "qwen3_5_moe": qwen3_5_moe}
VIDEO = tuple(FAMILIES)
