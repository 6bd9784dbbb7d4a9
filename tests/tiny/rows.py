"""Images of any size in rows, with a token of another id after each."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers

from tiny.models import latent_text, pixels, text, tower
from tiny.prompts import BREAK, END, IMAGE, Case, Media, lines


def pixtral_images(cell_px: int) -> list[Media]:
    return [
        Media(
            [lines(h, w, BREAK), END],
            {
                "pixel_values": pixels(1, 3, h * cell_px, w * cell_px),
                "image_sizes": torch.tensor([[h * cell_px, w * cell_px]]),
            },
        )
        for h, w in ((6, 10), (8, 7))
    ]


def mistral3(video: bool) -> Case:
    config = transformers.Mistral3Config(
        vision_config=tower(transformers.PixtralVisionConfig, 128),
        text_config=text(transformers.MistralConfig, sliding_window=None),
        image_token_index=IMAGE,
        spatial_merge_size=2,
    )
    return Case(transformers.Mistral3ForConditionalGeneration(config), [pixtral_images(cell_px=8)])


#: Queries are scaled, the more so the further after the first 16 positions.
SCALED = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 64.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
    "partial_rotary_factor": 0.4,
}


def mistral3_latent(video: bool) -> Case:
    config = transformers.Mistral3Config(
        vision_config=tower(transformers.PixtralVisionConfig, 128),
        text_config=latent_text(transformers.Mistral4Config, rope_parameters=SCALED),
        image_token_index=IMAGE,
        spatial_merge_size=2,
    )
    return Case(transformers.Mistral3ForConditionalGeneration(config), [pixtral_images(cell_px=8)])


FAMILIES: dict[str, Callable[[bool], Case]] = {"mistral3": mistral3, "mistral3_latent": mistral3_latent}
VIDEO = ()
