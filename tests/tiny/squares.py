"""Squares of one fixed size: an image, a tile or a frame each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import nn

from tiny.models import latent_text, pixels, pixels_name, since, stub_tower, text, tower
from tiny.prompts import AUDIO, END, IMAGE, START, VIDEO_TOKEN, Case, Media, square
from tiny.rows import pixtral_images


def llava(video: bool, strategy: Any = "default", decoder: Any = None) -> Case:
    config = transformers.LlavaConfig(
        vision_config=tower(transformers.CLIPVisionConfig, 32),
        text_config=decoder or text(),
        image_token_index=IMAGE,
        image_seq_length=64,
        vision_feature_select_strategy=strategy,
    )
    class_token = [IMAGE] if strategy == "full" else []
    images = [Media([*class_token, square(8, 8)], {"pixel_values": pixels(1, 3, 32, 32)}) for _ in range(2)]
    return Case(transformers.LlavaForConditionalGeneration(config), [images])


def llava_full(video: bool) -> Case:
    return llava(video, strategy="full")


def llava_latent(video: bool) -> Case:
    return llava(video, decoder=latent_text(transformers.DeepseekV2Config))


def llava_looped(video: bool) -> Case:
    types = ["full_attention", "full_attention", "sliding_attention", "full_attention"]
    loop = {"n_input_layers": 1, "n_output_layers": 1, "n_recurrent_loops": 2}  # the second and the third layer
    decoder = text(
        since("5.24", "DoryConfig"),
        num_hidden_layers=4,
        layer_types=types,
        sliding_window=48,
        initializer_range=0.125,
        **loop,
    )
    return llava(video, decoder=decoder)


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


def gemma3(video: bool, window: int = 48, config: str = "Gemma3Config") -> Case:
    kinds = ["sliding_attention", "full_attention"] * 2
    made = getattr(transformers, config)(
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
        transformers.Gemma3ForConditionalGeneration(made),
        [images],
        extra=lambda ids, rows: {"token_type_ids": (ids == IMAGE).long()},
    )


def gemma3_short(video: bool) -> Case:
    return gemma3(video, window=24)


# ---- one tower, one square


def whole(model: Any, side: int, size_px: int, *before: int, after: tuple[int, ...] = (), **more: Any) -> Case:
    """Two images of one square each, between the ids `before` and `after`; `more` are further inputs of an image."""
    images = [
        Media([*before, square(side, side), *after], {"pixel_values": pixels(1, 3, size_px, size_px), **more})
        for _ in range(2)
    ]
    return Case(model, [images])


def siglip(size_px: int) -> Any:
    return tower(transformers.SiglipVisionConfig, size_px, vision_use_head=False)


def deepseek_vl(video: bool) -> Case:
    config = transformers.DeepseekVLConfig(vision_config=siglip(32), text_config=text(), image_token_id=IMAGE)
    return whole(transformers.DeepseekVLForConditionalGeneration(config), 8, 32)


def deepseek_vl_hybrid(video: bool) -> Case:
    fine = tower(
        transformers.SamVisionConfig,
        128,
        output_channels=16,
        window_size=4,
        global_attn_indexes=[1],
        mlp_dim=48,
    )
    config = transformers.DeepseekVLHybridConfig(
        vision_config=siglip(32), high_res_vision_config=fine, text_config=text(), image_token_id=IMAGE
    )
    high = {"high_res_pixel_values": pixels(1, 3, 128, 128)}
    return whole(transformers.DeepseekVLHybridForConditionalGeneration(config), 8, 32, **high)


def janus(video: bool) -> Case:
    sizes = {"embed_dim": 8, "num_embeddings": 32, "latent_channels": 32, "base_channels": 32, "num_res_blocks": 1}
    drawing = transformers.JanusVQVAEConfig(
        **sizes,
        channel_multiplier=[1, 1],
        num_patches=4,
        projection_dim=32,
        num_hidden_layers=1,
        image_token_embed_dim=64,
    )
    vision = tower(transformers.JanusVisionConfig, 32, projection_dim=64, num_image_tokens=64)
    config = transformers.JanusConfig(vision_config=vision, vq_config=drawing, text_config=text(), image_token_id=IMAGE)
    return whole(transformers.JanusForConditionalGeneration(config), 8, 32, START, after=(END,))


def paligemma(video: bool, decoder: Any = None) -> Case:
    config = transformers.PaliGemmaConfig(
        vision_config=siglip(32),
        text_config=decoder or text(transformers.GemmaConfig),
        image_token_index=IMAGE,
        projection_dim=64,
        hidden_size=64,
    )
    config.vision_config.projection_dim = 64
    case = whole(transformers.PaliGemmaForConditionalGeneration(config), 8, 32)
    return replace(case, extra=lambda ids, rows: {"token_type_ids": torch.zeros_like(ids)})


def paligemma_gemma2(video: bool) -> Case:
    kinds = ["sliding_attention", "full_attention"]
    capped = {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0}
    return paligemma(video, text(transformers.Gemma2Config, layer_types=kinds, sliding_window=48, **capped))


def shieldgemma2(video: bool) -> Case:
    return gemma3(video, config="ShieldGemma2Config")


def chameleon(video: bool) -> Case:
    # Codes of the picture are spelt in letters, after a prefix and before a Z.
    codes = {"IMGIMG" + "".join("ABCDEFGHIJ"[int(digit)] for digit in str(i)) + "Z": 900 + i for i in range(32)}
    pictures = transformers.ChameleonVQVAEConfig(
        embed_dim=8,
        num_embeddings=32,
        latent_channels=8,
        resolution=32,
        base_channels=32,
        channel_multiplier=[1, 1, 1],
        num_res_blocks=1,
    )
    config = text(transformers.ChameleonConfig, vq_config=pictures, vocabulary_map={"<image>": IMAGE, **codes})
    return whole(transformers.ChameleonForConditionalGeneration(config), 8, 32, START, after=(END,))


def fast_vlm(video: bool) -> Case:
    vision = transformers.TimmWrapperConfig(
        architecture="fastvit_mci3", initializer_range=0.02, model_args={}, num_classes=0
    )
    vision.hidden_size = 32
    config = transformers.FastVlmConfig(
        vision_config=vision, text_config=text(transformers.Qwen2Config), image_token_index=IMAGE
    )
    config.image_seq_length = 64
    with stub_tower("fast_vlm", lambda x: nn.functional.avg_pool2d(x, 4), 32):
        model = transformers.FastVlmForConditionalGeneration(config)
    return whole(model, 8, 32)


def gemma3n(video: bool) -> Case:
    kinds = ["sliding_attention", "full_attention"] * 2
    decoder = text(
        transformers.Gemma3nTextConfig,
        num_hidden_layers=4,
        layer_types=kinds,
        sliding_window=48,
        vocab_size_per_layer_input=980,
        hidden_size_per_layer_input=8,
        altup_num_inputs=2,
        num_kv_shared_layers=2,
        laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 4,
    )
    hearing = transformers.Gemma3nAudioConfig(
        vocab_size=8,
        vocab_offset=988,
        hidden_size=32,
        conf_num_attention_heads=2,
        conf_num_hidden_layers=1,
        sscp_conv_channel_size=[4, 4],
        input_feat_size=16,
    )
    config = transformers.Gemma3nConfig(
        text_config=decoder,
        vision_config=transformers.Gemma3nVisionConfig(hidden_size=32, vocab_size=8, vocab_offset=980),
        audio_config=hearing,
        image_token_id=IMAGE,
        audio_token_id=AUDIO,
        boi_token_id=START,
        eoi_token_id=END,
        vision_soft_tokens_per_image=64,
    )
    with stub_tower("gemma3n", lambda x: nn.functional.avg_pool2d(x, 4), 32):
        model = transformers.Gemma3nForConditionalGeneration(config)
    case = whole(model, 8, 32, START, after=(END,))
    return replace(case, extra=lambda ids, rows: {"token_type_ids": (ids == IMAGE).long()})


def video_llava(video: bool) -> Case:
    config = transformers.VideoLlavaConfig(
        vision_config=tower(transformers.CLIPVisionConfig, 28, num_hidden_layers=3),
        text_config=text(),
        image_token_index=IMAGE,
        video_token_index=VIDEO_TOKEN,
        video_seq_length=8 * 50,
    )
    model = transformers.VideoLlavaForConditionalGeneration(config)
    if not video:
        name = pixels_name(model, "pixel_values_images")
        images = [replace(image, inputs={name: image.inputs["pixel_values"]}) for image in whole(model, 7, 28).rows[0]]
        return Case(model, [images])
    frames = [part for frame in range(8) for part in (VIDEO_TOKEN, square(7, 7, 1, VIDEO_TOKEN, frame=frame))]
    videos = [Media(frames, {"pixel_values_videos": pixels(1, 8, 3, 28, 28)}) for _ in range(2)]
    return Case(model, [videos])


SHORT: dict[str, Callable[[bool], Case]] = {"gemma3_short": gemma3_short}
FAMILIES: dict[str, Callable[[bool], Case]] = {
    "chameleon": chameleon,
    "deepseek_vl": deepseek_vl,
    "deepseek_vl_hybrid": deepseek_vl_hybrid,
    "fast_vlm": fast_vlm,
    "gemma3": gemma3,
    "gemma3n": gemma3n,
    "janus": janus,
    "llava": llava,
    "llava_full": llava_full,
    "llava_latent": llava_latent,
    "llava_looped": llava_looped,
    "llava_pixtral": llava_pixtral,
    "paligemma": paligemma,
    "paligemma_gemma2": paligemma_gemma2,
    "shieldgemma2": shieldgemma2,
    "video_llava": video_llava,
    "vipllava": vipllava,
}
VIDEO = ("video_llava",)
