"""Images of any size in rows, with a token of another id behind each."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers

from tiny.models import pixels, text, tower
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


FAMILIES: dict[str, Callable[[bool], Case]] = {"mistral3": mistral3}
VIDEO = ()
