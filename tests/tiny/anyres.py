"""Images of any resolution: a base tile, then all tiles together with newlines."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers

from tiny.models import pixels, text, tower
from tiny.prompts import IMAGE, VIDEO_TOKEN, Case, Media, Piece, lines, square


def anyres(tiles: int, size_px: tuple[int, int], *parts: Piece | int) -> Media:
    """An image of `size_px` pixels cut into `tiles` tiles of 24 x 24 pixels, after the base tile of 6 x 6 tokens."""
    inputs = {"pixel_values": pixels(1, 1 + tiles, 3, 24, 24), "image_sizes": torch.tensor([size_px])}
    return Media([square(6, 6, tile=0), *parts] if tiles else [square(6, 6), *parts], inputs)


def llava_next(video: bool) -> Case:
    config = transformers.LlavaNextConfig(
        vision_config=tower(transformers.CLIPVisionConfig, 24),
        text_config=text(),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[48, 48], [24, 72]],
    )
    images = [
        # 2 x 2 tiles are 12 x 12 tokens, but 40 / 48 of the height is picture: one row of padding on either side.
        anyres(4, (40, 48), lines(10, 12, IMAGE, tile=1), IMAGE),
        # 1 x 3 tiles are 6 x 18 tokens; 5.14 rows are picture, and half a row of padding is none.
        anyres(3, (20, 70), lines(6, 18, IMAGE, tile=1), IMAGE),
    ]
    return Case(transformers.LlavaNextForConditionalGeneration(config), [images])


def llava_onevision(video: bool) -> Case:
    config = transformers.LlavaOnevisionConfig(
        vision_config=tower(transformers.SiglipVisionConfig, 24, vision_use_head=False),
        text_config=text(transformers.Qwen2Config),
        image_token_index=IMAGE,
        video_token_index=VIDEO_TOKEN,
        image_grid_pinpoints=[[48, 48], [24, 72]],
        vision_aspect_ratio="anyres_max_2",
    )
    model = transformers.LlavaOnevisionForConditionalGeneration(config)
    if video:
        frames = square(3, 3, t=5, token=VIDEO_TOKEN)
        clips = [Media([frames, VIDEO_TOKEN], {"pixel_values_videos": pixels(1, 5, 3, 24, 24)}) for _ in range(2)]
        return Case(model, [clips])
    # 10 x 12 tokens are 1.29 times per side what two base tiles hold: shrunk to 7 x 9.
    alone = anyres(4, (40, 48), lines(7, 9, IMAGE, tile=1), IMAGE)
    together = [anyres(0, (40, 48), IMAGE), anyres(0, (30, 30), IMAGE)]
    return Case(
        model,
        [[alone]],
        few=[alone],
        many=together,
        extra=lambda ids, rows: {"batch_num_images": torch.tensor([len(row) for row in rows])},
    )


def llava_next_video(video: bool) -> Case:
    config = transformers.LlavaNextVideoConfig(
        vision_config=tower(transformers.CLIPVisionConfig, 24),
        text_config=text(),
        image_token_index=IMAGE,
        video_token_index=VIDEO_TOKEN,
        image_grid_pinpoints=[[48, 48], [24, 72]],
    )
    model = transformers.LlavaNextVideoForConditionalGeneration(config)
    if not video:
        return Case(model, llava_next(video).rows)
    clips = [Media([square(3, 3, 5, VIDEO_TOKEN)], {"pixel_values_videos": pixels(1, 5, 3, 24, 24)}) for _ in range(2)]
    return Case(model, [clips])


def granite4_vision(video: bool) -> Case:
    reader = {
        "model_type": "blip_2_qformer",
        "hidden_size": 64,
        "encoder_hidden_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 48,
        "cross_attention_frequency": 1,
        "max_position_embeddings": 64,
        "use_qformer_text_input": False,
    }
    config = transformers.Granite4VisionConfig(
        vision_config=tower(transformers.CLIPVisionConfig, 48, hidden_size=64),
        text_config=text(transformers.Granite4VisionTextConfig, num_hidden_layers=4),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[96, 96], [48, 144]],
        downsample_rate="2/4",
        deepstack_layer_map=[[-1, 0], [-2, 1]],
        spatial_vision_layer=-1,
        spatial_target_layers=[0, 1, 2, 3],
        qformer_config=reader,
    )
    model = transformers.Granite4VisionForConditionalGeneration(config)
    # As LLaVA-NeXT, twice as large: half of the patches along a side become tokens.
    images = [
        Media(
            [square(6, 6, tile=0), lines(h, w, IMAGE, tile=1), IMAGE],
            {"pixel_values": pixels(1, 1 + tiles, 3, 48, 48), "image_sizes": torch.tensor([size_px])},
        )
        for tiles, size_px, h, w in ((4, (80, 96), 10, 12), (3, (40, 140), 6, 18))
    ]
    return Case(model, [images])


FAMILIES: dict[str, Callable[[bool], Case]] = {
    "granite4_vision": granite4_vision,
    "llava_next": llava_next,
    "llava_next_video": llava_next_video,
    "llava_onevision": llava_onevision,
}
VIDEO = ("llava_next_video", "llava_onevision")
