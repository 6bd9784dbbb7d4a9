"""Features without a grid: what learned queries have read from an image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

from tiny.models import pixels, text, tower
from tiny.prompts import IMAGE, OTHER, Case, Media, Piece


def line(tokens: int) -> Piece:
    """A run of tokens whose grid nobody knows."""
    return Piece([IMAGE] * tokens, None)


def runs(model: Any, tokens: int, size_px: int, *before: int, stacked: bool = False) -> Case:
    images = [Media([*before, line(tokens)], {"pixel_values": pixels(1, 3, size_px, size_px)}) for _ in range(2)]
    return Case(model, [images], stacked=stacked)


def aria(video: bool) -> Case:
    config = transformers.AriaConfig(
        vision_config=tower(transformers.Idefics3VisionConfig, 32, 8),
        text_config=text(transformers.AriaTextConfig, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
        image_token_index=IMAGE,
        projector_patch_to_query_dict={16: 40},
    )
    return runs(transformers.AriaForConditionalGeneration(config), 40, 32)


def idefics2(video: bool) -> Case:
    queries = transformers.Idefics2PerceiverConfig(
        hidden_size=64,
        resampler_n_latents=40,
        resampler_depth=1,
        resampler_n_heads=2,
        resampler_head_dim=8,
        num_key_value_heads=1,
    )
    config = transformers.Idefics2Config(
        vision_config=tower(transformers.Idefics2VisionConfig, 32, 8),
        perceiver_config=queries,
        text_config=text(transformers.MistralConfig, sliding_window=None),
        image_token_id=IMAGE,
    )
    return runs(transformers.Idefics2ForConditionalGeneration(config), 40, 32, OTHER, stacked=True)


#: Vision towers and text decoder of the models of DeepSeek-OCR's kind.
FINE: dict[str, Any] = {
    "output_channels": 16,
    "window_size": 4,
    "global_attn_indexes": [1],
    "mlp_dim": 48,
    "downsample_channels": [24, 32],
}
DECODER: dict[str, Any] = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "mlp_layer_types": ["dense", "sparse"],
}


def deepseek_ocr2(video: bool) -> Case:
    from transformers.models.deepseek_ocr2 import configuration_deepseek_ocr2 as configurations

    encoder = configurations.DeepseekOcr2VisionEncoderConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=16,
    )
    config = transformers.DeepseekOcr2Config(
        vision_config=configurations.DeepseekOcr2VisionConfig(
            sam_config=tower(configurations.DeepseekOcr2SamVisionConfig, 64, **FINE), encoder_config=encoder
        ),
        text_config=text(configurations.DeepseekOcr2TextConfig, **DECODER),
        image_token_id=IMAGE,
    )
    # 144 queries, and a token after them that ends the view.
    return runs(transformers.DeepseekOcr2ForConditionalGeneration(config), 145, 64)


FAMILIES: dict[str, Callable[[bool], Case]] = {"aria": aria, "deepseek_ocr2": deepseek_ocr2, "idefics2": idefics2}
VIDEO = ()
