"""Qwen-VL and Qwen-Omni."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from tiny.models import text
from tiny.prompts import AUDIO, END, IMAGE, START, VIDEO_TOKEN, Case
from tiny.thw import DEEP, EXPERTS, MARKS, MROPE, PATCHES, WINDOWED, grids


def qwen2_vl(video: bool) -> Case:
    config = transformers.Qwen2VLConfig(
        vision_config={**PATCHES, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
        text_config=text(transformers.Qwen2VLTextConfig, rope_parameters=MROPE),
        **MARKS,
    )
    return grids(transformers.Qwen2VLForConditionalGeneration(config), video)


def qwen2_5_vl(video: bool) -> Case:
    config = transformers.Qwen2_5_VLConfig(
        vision_config=WINDOWED,
        text_config=text(transformers.Qwen2_5_VLTextConfig, rope_parameters=MROPE),
        **MARKS,
    )
    return grids(transformers.Qwen2_5_VLForConditionalGeneration(config), video)


def qwen3_vl(video: bool) -> Case:
    config = transformers.Qwen3VLConfig(
        vision_config=DEEP, text_config=text(transformers.Qwen3VLTextConfig, rope_parameters=MROPE), **MARKS
    )
    return grids(transformers.Qwen3VLForConditionalGeneration(config), video, apart=True)


def qwen3_vl_moe(video: bool) -> Case:
    decoder = text(transformers.Qwen3VLMoeTextConfig, rope_parameters=MROPE, num_experts=4, **EXPERTS)
    config = transformers.Qwen3VLMoeConfig(vision_config=DEEP, text_config=decoder, **MARKS)
    return grids(transformers.Qwen3VLMoeForConditionalGeneration(config), video, apart=True)


def omni(model: nn.Module, video: bool) -> Case:
    def seconds(t: int, h: int, w: int) -> dict[str, Any]:
        return {"video_second_per_grid": torch.tensor([1.0])} if video else {}

    return grids(model, video, types=False, more=seconds)


HEARING = {
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "d_model": 32,
    "max_source_positions": 16,
    "n_window": 4,
    "output_dim": 64,
}


def qwen2_5_omni_thinker(video: bool) -> Case:
    config = transformers.Qwen2_5OmniThinkerConfig(
        vision_config=WINDOWED,
        audio_config={**HEARING, "num_mel_bins": 8},
        text_config=text(dict, rope_parameters=MROPE),
        image_token_index=IMAGE,
        video_token_index=VIDEO_TOKEN,
        audio_token_index=AUDIO,
    )
    config.vision_start_token_id, config.vision_end_token_id = START, END
    return omni(transformers.Qwen2_5OmniThinkerForConditionalGeneration(config), video)


def qwen3_omni_moe_thinker(video: bool) -> Case:
    config = transformers.Qwen3OmniMoeThinkerConfig(
        vision_config=DEEP,
        audio_config={**HEARING, "num_mel_bins": 16, "n_window_infer": 8, "downsample_hidden_size": 8},
        text_config=text(dict, rope_parameters=MROPE, num_experts=4, **EXPERTS),
        audio_token_id=AUDIO,
        image_token_id=IMAGE,
        video_token_id=VIDEO_TOKEN,
    )
    config.vision_start_token_id, config.vision_end_token_id = START, END
    return omni(transformers.Qwen3OmniMoeThinkerForConditionalGeneration(config), video)
