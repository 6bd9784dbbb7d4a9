"""Squares of one size, several an image: tiles in one run, or with words between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import nn

from tiny.models import pixels, stub_tower, text, tower
from tiny.prompts import BREAK, END, IMAGE, START, VIDEO_TOKEN, Case, Media, square
from tiny.squares import siglip

# ---- with words between them


def apart(side: int, size_px: int, *before: int, after: tuple[int, ...] = (), count: int = 3) -> list[Media]:
    """Tiles of one square each: as nothing but words tells which belong together, each is taken for an image."""
    tile = [*before, square(side, side), *after]
    return [Media(tile, {"pixel_values": pixels(1, 3, size_px, size_px)}) for _ in range(count)]


def idefics3(video: bool, name: str = "Idefics3") -> Case:
    config = getattr(transformers, f"{name}Config")(
        vision_config=tower(getattr(transformers, f"{name}VisionConfig"), 64),
        text_config=text(),
        image_token_id=IMAGE,
        scale_factor=2,
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    return Case(model, [apart(8, 64, START, BREAK)], stacked=True)


def smolvlm(video: bool) -> Case:
    return idefics3(video, "SmolVLM")


def internvl(video: bool, decoder: Any = None) -> Case:
    config = transformers.InternVLConfig(
        vision_config=tower(transformers.InternVLVisionConfig, [64, 64], [4, 4]),
        text_config=decoder or text(transformers.Qwen2Config),
        image_token_id=IMAGE,
        image_seq_length=64,
        downsample_ratio=0.5,
    )
    tiled = Media([START, *(square(8, 8, tile=tile) for tile in range(3)), END], {"pixel_values": pixels(3, 3, 64, 64)})
    single = Media([START, square(8, 8), END], {"pixel_values": pixels(1, 3, 64, 64)})
    return Case(transformers.InternVLForConditionalGeneration(config), [[tiled, single]])


def internvl_short(video: bool) -> Case:
    windows = {"sliding_window": 24, "layer_types": ["full_attention", "sliding_attention"]}
    return internvl(video, text(transformers.Qwen2Config, use_sliding_window=True, **windows))


def internvl_gpt_oss(video: bool) -> Case:
    windows = {"sliding_window": 48, "layer_types": ["sliding_attention", "full_attention"]}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    case = internvl(video, text(transformers.GptOssConfig, **windows, **rope, **experts))
    for layer in case.model.model.language_model.layers:
        layer.self_attn.sinks.data.normal_(2, 1)  # as large as the scores
    return case


def cohere(name: str, **settings: Any) -> Case:
    decoder = text(transformers.Cohere2Config, layer_types=["sliding_attention", "full_attention"], sliding_window=48)
    config = getattr(transformers, f"{name}Config")(
        vision_config=siglip(64), text_config=decoder, downsample_factor=2, **settings
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    return Case(model, [apart(8, 64, START, after=(BREAK,))])


def aya_vision(video: bool) -> Case:
    return cohere("AyaVision", image_token_index=IMAGE)


def cohere2_vision(video: bool) -> Case:
    return cohere("Cohere2Vision", image_token_id=IMAGE, alignment_intermediate_size=64)


def ovis2(video: bool) -> Case:
    vision = tower(transformers.Ovis2VisionConfig, 64, vocab_size=64, hidden_stride=2)
    config = transformers.Ovis2Config(
        vision_config=vision,
        text_config=text(transformers.Qwen2Config),
        image_token_id=IMAGE,
        visual_indicator_token_ids=[980, 981, 982, 983, 984],
        vocab_size=1000,
        hidden_size=64,
    )
    return Case(transformers.Ovis2ForConditionalGeneration(config), [apart(8, 64, 981)])


def llama4(video: bool) -> Case:
    vision = tower(
        transformers.Llama4VisionConfig,
        64,
        intermediate_size=128,
        vision_output_dim=64,
        projector_input_dim=64,
        projector_output_dim=64,
        pixel_shuffle_ratio=0.5,
    )
    decoder = text(
        transformers.Llama4TextConfig,
        num_hidden_layers=4,
        intermediate_size_mlp=96,
        num_local_experts=2,
        attention_chunk_size=48,
        floor_scale=16,
        interleave_moe_layer_step=2,
    )
    config = transformers.Llama4Config(
        vision_config=vision,
        text_config=decoder,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )
    return Case(transformers.Llama4ForConditionalGeneration(config), [apart(8, 64, START)])


def granite_docling(video: bool, fine: bool = False) -> Case:
    vision = tower(
        transformers.GraniteDoclingVisionConfig,
        32,
        num_hidden_layers=3,
        out_hidden_size=64,
        scale_factor=2,
        deepstack_visual_indexes=[0, 1],
    )
    config = transformers.GraniteDoclingConfig(
        vision_config=vision,
        text_config=text(transformers.GraniteDoclingTextConfig, embedding_multiplier=2.0),
        image_token_id=IMAGE,
        pad_token_id=0,
    )
    tiles = [
        replace(tile, inputs={**tile.inputs, "pixel_attention_mask": torch.ones(1, dtype=torch.bool)})
        for tile in apart(4, 32, START, BREAK)
    ]
    return Case(transformers.GraniteDoclingForConditionalGeneration(config), [tiles], stacked=True)


# ---- in one run


def together(model: Any, side: int, size_px: int, *before: int, after: tuple[int, ...] = ()) -> Case:
    """An image of three tiles, and one of a single tile."""
    numbers: list[dict[str, int]] = [{"tile": tile} for tile in range(3)]
    images = [
        Media(
            [*before, *(square(side, side, **number) for number in of_image), *after],
            {"pixel_values": pixels(len(of_image), 3, size_px, size_px)},
        )
        for of_image in (numbers, [{}])
    ]
    return Case(model, [images])


def qianfan_ocr(video: bool) -> Case:
    config = transformers.QianfanOCRConfig(
        vision_config=tower(transformers.QianfanOCRVisionConfig, [64, 64], [4, 4]),
        text_config=text(transformers.Qwen3Config),
        image_token_id=IMAGE,
        image_seq_length=64,
        downsample_ratio=0.5,
    )
    return together(transformers.QianfanOCRForConditionalGeneration(config), 8, 64, START, after=(END,))


def got_ocr2(video: bool, config: str = "GotOcr2Config") -> Case:
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 48}
    made = getattr(transformers, config)(
        vision_config=transformers.GotOcr2VisionConfig(
            **vision, output_channels=32, image_size=128, patch_size=4, window_size=4, global_attn_indexes=(1,)
        ),
        text_config=text(transformers.Qwen2Config),
        image_token_index=IMAGE,
    )
    return together(transformers.GotOcr2ForConditionalGeneration(made), 8, 128, START, after=(END,))


def pp_chart2table(video: bool) -> Case:
    return got_ocr2(video, "PPChart2TableConfig")


def perception_lm(video: bool) -> Case:
    vision = transformers.TimmWrapperConfig(
        architecture="vit_pe_core_large_patch4_32",
        model_args={"embed_dim": 32, "img_size": [48, 48]},
        num_classes=0,
    )
    config = transformers.PerceptionLMConfig(
        vision_config=vision,
        text_config=text(),
        image_token_id=IMAGE,
        video_token_id=VIDEO_TOKEN,
        vision_use_cls_token=False,
        projector_pooling_ratio=2,
    )
    with stub_tower("perception_lm", lambda x: nn.functional.avg_pool2d(x, 4).flatten(2).transpose(1, 2), 32):
        model = transformers.PerceptionLMForConditionalGeneration(config)
    if video:
        frames = square(6, 6, 5, VIDEO_TOKEN)
        return Case(model, [[Media([frames], {"pixel_values_videos": pixels(1, 5, 3, 48, 48)}) for _ in range(2)]])
    tiles = [square(6, 6, tile=tile) for tile in range(3)]
    return Case(model, [[Media(tiles, {"pixel_values": pixels(1, 3, 3, 48, 48)}) for _ in range(2)]])


SHORT: dict[str, Callable[[bool], Case]] = {"internvl_short": internvl_short}
FAMILIES: dict[str, Callable[[bool], Case]] = {
    "aya_vision": aya_vision,
    "cohere2_vision": cohere2_vision,
    "got_ocr2": got_ocr2,
    "granite_docling": granite_docling,
    "idefics3": idefics3,
    "internvl": internvl,
    "internvl_gpt_oss": internvl_gpt_oss,
    "llama4": llama4,
    "ovis2": ovis2,
    "perception_lm": perception_lm,
    "pp_chart2table": pp_chart2table,
    "qianfan_ocr": qianfan_ocr,
    "smolvlm": smolvlm,
}
VIDEO = ("perception_lm",)
