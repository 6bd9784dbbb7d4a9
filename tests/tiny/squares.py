"""Squares of one fixed size: an image, a tile or a frame each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from tiny.models import pixels, text, tower
from tiny.rows import pixtral_images
from tiny.prompts import BREAK, END, IMAGE, START, VIDEO_TOKEN, Case, Media, Piece, lines, square


def llava(video: bool, strategy: Any = "default") -> Case:
    config = transformers.LlavaConfig(
        vision_config=tower(transformers.CLIPVisionConfig, 32),
        text_config=text(),
        image_token_index=IMAGE,
        image_seq_length=64,
        vision_feature_select_strategy=strategy,
    )
    class_token = [IMAGE] if strategy == "full" else []
    images = [Media([*class_token, square(8, 8)], {"pixel_values": pixels(1, 3, 32, 32)}) for _ in range(2)]
    return Case(transformers.LlavaForConditionalGeneration(config), [images])


def llava_full(video: bool) -> Case:
    return llava(video, strategy="full")


def llava_pixtral(video: bool) -> Case:
    config = transformers.LlavaConfig(
        vision_config=tower(transformers.PixtralVisionConfig, 64),
        text_config=text(transformers.MistralConfig, sliding_window=None),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return Case(transformers.LlavaForConditionalGeneration(config), [pixtral_images(cell_px=4)])


def vipllava(video: bool) -> Case:
    config = transformers.VipLlavaConfig(
        vision_config=tower(transformers.CLIPVisionConfig, 28),
        text_config=text(),
        image_token_index=IMAGE,
        vision_feature_layers=[-1, -2],
    )
    images = [Media([square(7, 7)], {"pixel_values": pixels(1, 3, 28, 28)}) for _ in range(2)]
    return Case(transformers.VipLlavaForConditionalGeneration(config), [images])


def gemma3(video: bool, window: int = 48) -> Case:
    kinds = ["sliding_attention", "full_attention"] * 2
    config = transformers.Gemma3Config(
        vision_config=tower(transformers.SiglipVisionConfig, 64, vision_use_head=False),
        text_config=text(
            transformers.Gemma3TextConfig,
            num_hidden_layers=4,
            layer_types=kinds,
            sliding_window=window,
            query_pre_attn_scalar=16,
        ),
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
        mm_tokens_per_image=64,
    )
    images = [Media([START, square(8, 8), END], {"pixel_values": pixels(1, 3, 64, 64)}) for _ in range(2)]
    return Case(
        transformers.Gemma3ForConditionalGeneration(config),
        [images],
        extra=lambda ids, rows: {"token_type_ids": (ids == IMAGE).long()},
    )


def idefics3(video: bool, name: str = "Idefics3") -> Case:
    config = getattr(transformers, f"{name}Config")(
        vision_config=tower(getattr(transformers, f"{name}VisionConfig"), 64),
        text_config=text(),
        image_token_id=IMAGE,
        scale_factor=2,
    )
    tiles = [Media([START, BREAK, square(8, 8)], {"pixel_values": pixels(1, 3, 64, 64)}) for _ in range(3)]
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    return Case(model, [tiles], stacked=True)


def smolvlm(video: bool) -> Case:
    return idefics3(video, "SmolVLM")


def internvl(video: bool, **settings: Any) -> Case:
    config = transformers.InternVLConfig(
        vision_config=tower(transformers.InternVLVisionConfig, [64, 64], [4, 4]),
        text_config=text(transformers.Qwen2Config, **settings),
        image_token_id=IMAGE,
        image_seq_length=64,
        downsample_ratio=0.5,
    )
    tiled = Media([START, *(square(8, 8, tile=tile) for tile in range(3)), END], {"pixel_values": pixels(3, 3, 64, 64)})
    single = Media([START, square(8, 8), END], {"pixel_values": pixels(1, 3, 64, 64)})
    return Case(transformers.InternVLForConditionalGeneration(config), [[tiled, single]])


def gemma3_short(video: bool) -> Case:
    return gemma3(video, window=24)


def internvl_short(video: bool) -> Case:
    kinds = ["full_attention", "sliding_attention"]
    return internvl(video, use_sliding_window=True, sliding_window=24, layer_types=kinds)


SHORT: dict[str, Callable[[bool], Case]] = {"gemma3_short": gemma3_short, "internvl_short": internvl_short}
FAMILIES: dict[str, Callable[[bool], Case]] = {
    "gemma3": gemma3,
    "idefics3": idefics3,
    "internvl": internvl,
    "llava": llava,
    "llava_full": llava_full,
    "llava_pixtral": llava_pixtral,
    "smolvlm": smolvlm,
    "vipllava": vipllava,
}
VIDEO = ()
