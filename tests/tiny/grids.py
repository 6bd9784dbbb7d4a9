"""Images and videos of any size whose grids come with the pixels (Qwen-VL, GLM-V and many others)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from gazepatch.caches.name import CACHE, FORMER
from tiny.glm import glm4v, glm4v_moe, glm46v, glm_ocr, glmga
from tiny.models import latent_text, pixels, text
from tiny.prompts import (
    AUDIO,
    BREAK,
    END,
    IMAGE,
    START,
    VIDEO_END,
    VIDEO_START,
    VIDEO_TOKEN,
    Case,
    Media,
    lines,
)
from tiny.qwen import (
    qwen2_5_omni_thinker,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_omni_moe_thinker,
    qwen3_vl,
    qwen3_vl_moe,
)
from tiny.thw import DEEP, EXPERTS, IMAGES, MARKS, MROPE, ONE, PATCHES, WINDOWED, WINDOWS, grids

# ---- of Qwen's kind


def cosmos3_omni(video: bool) -> Case:
    config = transformers.Cosmos3OmniConfig(
        vision_config=transformers.Qwen3VLVisionConfig(**DEEP),
        text_config=text(transformers.Qwen3VLTextConfig, rope_parameters=MROPE),
        **MARKS,
    )
    return grids(transformers.Cosmos3OmniForConditionalGeneration(config), video, apart=True)


def cosmos3_edge(video: bool) -> Case:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Cosmos3EdgeConfig(
        vision_config=transformers.Cosmos3EdgeVisionConfig(
            **vision, patch_size=4, num_patches=64, spatial_merge_size=2
        ),
        text_config=text(transformers.Cosmos3EdgeTextConfig, rope_parameters=MROPE),
        projector_hidden_size=64,
        **MARKS,
    )
    return grids(transformers.Cosmos3EdgeForConditionalGeneration(config), video, patch=(ONE,), apart=True)


def cohere_compass(video: bool) -> Case:
    ropes = {kind: dict(MROPE) for kind in ("full_attention", "sliding_attention")}
    config = transformers.CohereCompassConfig(
        vision_config=DEEP,
        text_config=text(transformers.CohereCompassTextConfig, rope_parameters=ropes, **WINDOWS),
        **MARKS,
    )
    return grids(transformers.CohereCompassForConditionalGeneration(config), video, apart=True)


def ernie4_5_vl_moe(video: bool) -> Case:
    decoder = text(
        transformers.Ernie4_5_VLMoeTextConfig,
        moe_intermediate_size=[32, 32],
        moe_k=2,
        moe_num_experts=4,
        moe_num_shared_experts=1,
        rope_parameters={**MROPE, "mrope_section": [3, 3, 2]},
        mlp_layer_types=["dense", "sparse"],
    )
    vision = {**PATCHES, "hidden_size": 32, "intermediate_size": 48, "temporal_merge_size": 2}
    config = transformers.Ernie4_5_VLMoeConfig(
        vision_config={name: value for name, value in vision.items() if name != "temporal_patch_size"},
        text_config=decoder,
        image_start_token_id=START,
        image_end_token_id=END,
        image_token_id=IMAGE,
        video_start_token_id=VIDEO_START,
        video_end_token_id=VIDEO_END,
        video_token_id=VIDEO_TOKEN,
    )

    def experts(ids: Tensor) -> dict[str, Tensor]:
        return {"moe_mm_token_type_ids": sum((ids == i).long() for i in (IMAGE, VIDEO_TOKEN, START, END))}

    model = transformers.Ernie4_5_VLMoeForConditionalGeneration(config)
    return grids(model, video, patch=(ONE,), frames_a_step=2 if video else 1, extra=experts)


def exaone4_5(video: bool) -> Case:
    config = transformers.Exaone4_5_Config(
        vision_config=transformers.Exaone4_5_VisionConfig(**WINDOWED, num_key_value_heads=2),
        text_config=text(transformers.Exaone4Config, **WINDOWS),
        image_token_id=IMAGE,
        video_token_id=VIDEO_TOKEN,
    )
    return grids(transformers.Exaone4_5_ForConditionalGeneration(config), video, types=False)


def hyperclovax_vision_v2(video: bool) -> Case:
    config = transformers.HyperCLOVAXVisionV2Config(
        vision_config=transformers.Qwen2_5_VLVisionConfig(**{**WINDOWED, "out_hidden_size": 48}),
        text_config=text(transformers.HyperCLOVAXConfig),
        image_token_id=IMAGE,
        video_token_id=VIDEO_TOKEN,
    )
    return grids(transformers.HyperCLOVAXVisionV2ForConditionalGeneration(config), video, types=False)


def paddleocr_vl(video: bool) -> Case:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.PaddleOCRVLConfig(
        vision_config={**vision, "image_size": 32, "patch_size": 4, "spatial_merge_size": 2},
        text_config=text(dict, rope_parameters=MROPE),
        **MARKS,
    )
    return grids(transformers.PaddleOCRVLForConditionalGeneration(config), False, patch=(3, 4, 4))


def video_llama_3(video: bool) -> Case:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.VideoLlama3Config(
        vision_config=transformers.VideoLlama3VisionConfig(**vision, patch_size=4),
        text_config=text(transformers.Qwen2Config),
        image_token_id=IMAGE,
        video_token_id=VIDEO_TOKEN,
    )
    merge = 2 if video else 1

    def merges(t: int, h: int, w: int) -> dict[str, Any]:
        if not video:
            return {"image_merge_sizes": torch.tensor([merge])}
        whole = torch.ones(t * h * w, dtype=torch.bool)
        return {"video_merge_sizes": torch.tensor([merge]), "video_compression_mask": whole}

    model = transformers.VideoLlama3ForConditionalGeneration(config)
    return grids(model, video, patch=(ONE,), merge=merge, apart=True, types=False, more=merges)


def minimax_m3_vl(video: bool) -> Case:
    decoder = text(
        transformers.MiniMaxM3VLTextConfig,
        num_hidden_layers=3,
        num_experts_per_tok=2,
        num_local_experts=4,
        dense_intermediate_size=64,
        shared_intermediate_size=32,
        rotary_dim=8,
        index_n_heads=2,
        index_head_dim=8,
        index_block_size=16,
        index_topk_blocks=4,
        layer_types=["full_attention", "minimax_m3_sparse", "full_attention"],
    )
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.MiniMaxM3VLConfig(
        vision_config=transformers.MiniMaxM3VLVisionConfig(
            **vision, image_size=32, patch_size=4, temporal_patch_size=2, spatial_merge_size=2
        ),
        text_config=decoder,
        image_token_index=IMAGE,
        video_token_index=VIDEO_TOKEN,
        projector_hidden_size=64,
    )
    return grids(transformers.MiniMaxM3SparseForConditionalGeneration(config), video, apart=True, types=False)


def muse(name: str, video: bool, decoder: dict[str, Any], **settings: Any) -> Case:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    places = {"pos_emb_height": 8, "pos_emb_width": 8, "max_position_embeddings": 64}
    config = getattr(transformers, f"{name}Config")(
        vision_config=getattr(transformers, f"{name}VisionConfig")(**vision, **places, patch_size=4, merge_size=2),
        text_config=text(
            getattr(transformers, f"{name}TextConfig"), layer_rope_theta=[10000.0, 0.0], **WINDOWS, **decoder
        ),
        image_token_id=IMAGE,
        video_token_id=VIDEO_TOKEN,
        out_hidden_size=128,
        projector_hidden_size=32,
        **settings,
    )
    return grids(getattr(transformers, f"{name}ForConditionalGeneration")(config), video, apart=True, types=False)


def muse_glimmer(video: bool) -> Case:
    return muse("MuseGlimmer", video, {})


def muse_spark(video: bool) -> Case:
    experts = {**EXPERTS, "num_local_experts": 4, "moe_hidden_size": 64}
    hearing = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "out_hidden_size": 64}
    return muse("MuseSpark", video, experts, audio_token_id=AUDIO, audio_config=hearing)


def kimi_k25(video: bool) -> Case:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Kimi_K25Config(
        vision_config={**vision, "patch_size": 4, "pos_emb_height": 8, "pos_emb_width": 8},
        text_config=latent_text(transformers.DeepseekV3Config),
        projection_hidden_size=32,
        tie_word_embeddings=False,
        **MARKS,
    )
    # Every chunk of a video has a grid, as an image has. Before transformers 5.24 it can only have a single frame.
    frames = 3 if video and CACHE != FORMER else 1
    return grids(
        transformers.Kimi_K25ForConditionalGeneration(config),
        video,
        patch=(3, 4, 4),
        types=False,
        sizes=IMAGES,
        frames_a_step=frames,
    )


# ---- with newlines


def hunyuan_vl(video: bool) -> Case:
    rope = {**MROPE, "mrope_section": [2, 2, 2, 2]}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.HunYuanVLConfig(
        vision_config=transformers.HunYuanVLVisionConfig(
            **vision, out_hidden_size=64, patch_size=4, spatial_merge_size=2, max_image_size=64, text_hidden_size=64
        ),
        text_config=text(transformers.HunYuanVLTextConfig, rope_parameters=rope),
        image_token_id=IMAGE,
        im_start_id=START,
        im_end_id=END,
        im_newline_id=BREAK,
    )
    images = []
    for _, h, w in IMAGES:
        inputs = {"pixel_values": pixels(4 * h * w, ONE), "image_grid_thw": torch.tensor([[1, 2 * h, 2 * w]])}
        # A feature that begins the image, a newline after every row, and one that ends it.
        images.append(Media([START, IMAGE, lines(h, w, IMAGE), IMAGE, IMAGE, END], inputs))
    return Case(
        transformers.HunYuanVLForConditionalGeneration(config),
        [images],
        extra=lambda ids, rows: {"mm_token_type_ids": (ids == IMAGE).long()},
    )


FAMILIES: dict[str, Callable[[bool], Case]] = {
    "cohere_compass": cohere_compass,
    "cosmos3_edge": cosmos3_edge,
    "cosmos3_omni": cosmos3_omni,
    "ernie4_5_vl_moe": ernie4_5_vl_moe,
    "exaone4_5": exaone4_5,
    "glm46v": glm46v,
    "glm4v": glm4v,
    "glm4v_moe": glm4v_moe,
    "glm_ocr": glm_ocr,
    "glmga": glmga,
    "hunyuan_vl": hunyuan_vl,
    "hyperclovax_vision_v2": hyperclovax_vision_v2,
    "kimi_k25": kimi_k25,
    "minimax_m3_vl": minimax_m3_vl,
    "muse_glimmer": muse_glimmer,
    "muse_spark": muse_spark,
    "paddleocr_vl": paddleocr_vl,
    "qwen2_5_omni_thinker": qwen2_5_omni_thinker,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen2_vl": qwen2_vl,
    "qwen3_omni_moe_thinker": qwen3_omni_moe_thinker,
    "qwen3_vl": qwen3_vl,
    "qwen3_vl_moe": qwen3_vl_moe,
    "video_llama_3": video_llama_3,
}
VIDEO = tuple(name for name in FAMILIES if name not in ("hunyuan_vl", "paddleocr_vl"))
