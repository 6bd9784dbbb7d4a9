"""GLM-V: the frames of a video have the id of images, between marks of their own."""

from __future__ import annotations

from typing import Any

import transformers

from tiny.models import text
from tiny.prompts import END, IMAGE, START, VIDEO_END, VIDEO_START, VIDEO_TOKEN, Case
from tiny.thw import EXPERTS, MROPE, PATCHES, grids

GLM_PATCHES = {**PATCHES, "hidden_size": 32, "image_size": 32, "out_hidden_size": 64, "intermediate_size": 48}
GLM_MARKS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO_TOKEN,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": VIDEO_START,
    "video_end_token_id": VIDEO_END,
}
GLM_ROPE = {**MROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}


def glm(config: Any, model: str, video: bool) -> Case:
    built = getattr(transformers, f"{model}ForConditionalGeneration")(config)
    return grids(built, video, apart=True, as_images=True)


def glm4v(video: bool) -> Case:
    decoder = text(transformers.Glm4vTextConfig, rope_parameters=GLM_ROPE)
    return glm(transformers.Glm4vConfig(vision_config=GLM_PATCHES, text_config=decoder, **GLM_MARKS), "Glm4v", video)


def glm46v(video: bool, config: str = "Glm46VConfig") -> Case:
    made = getattr(transformers, config)(
        vision_config=transformers.Glm4vVisionConfig(**GLM_PATCHES),
        text_config=text(transformers.Glm4vTextConfig, rope_parameters=GLM_ROPE),
        **GLM_MARKS,
    )
    return glm(made, "Glm46V", video)


def glmga(video: bool) -> Case:
    return glm46v(video, "GlmgaConfig")


def glm4v_moe(video: bool) -> Case:
    decoder = text(
        transformers.Glm4vMoeTextConfig,
        n_routed_experts=4,
        first_k_dense_replace=1,
        rope_parameters=GLM_ROPE,
        **EXPERTS,
    )
    config = transformers.Glm4vMoeConfig(vision_config=GLM_PATCHES, text_config=decoder, **GLM_MARKS)
    return glm(config, "Glm4vMoe", video)


def glm_ocr(video: bool) -> Case:
    decoder = text(transformers.GlmOcrTextConfig, rope_parameters=GLM_ROPE)
    config = transformers.GlmOcrConfig(vision_config=GLM_PATCHES, text_config=decoder, **GLM_MARKS)
    return glm(config, "GlmOcr", video)
