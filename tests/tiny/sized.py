"""Images of any size, each one run of tokens or one a row, whose sizes come with the pixels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from tiny.models import VOCAB, pixels, pixels_name, text, tower
from tiny.prompts import (
    AUDIO,
    BREAK,
    END,
    IMAGE,
    OTHER,
    START,
    VIDEO_END,
    VIDEO_START,
    VIDEO_TOKEN,
    Case,
    Media,
    lines,
    square,
)
from tiny.runs import DECODER, FINE

SIZES = ((6, 10), (8, 7))
#: Of an encoder that makes codes of pictures, and halves these once.
CODES: dict[str, Any] = {
    "codebook_size": 64,
    "embed_dim": 4,
    "latent_channels": 4,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
}


def lighton_ocr(video: bool) -> Case:
    config = transformers.LightOnOcrConfig(
        vision_config=tower(transformers.PixtralVisionConfig, 128),
        text_config=text(transformers.Qwen3Config),
        image_token_id=IMAGE,
        spatial_merge_size=2,
    )
    images = [
        Media(
            [square(h, w)],
            {"pixel_values": pixels(1, 3, 8 * h, 8 * w), "image_sizes": torch.tensor([[8 * h, 8 * w]])},
        )
        for h, w in SIZES
    ]
    return Case(transformers.LightOnOcrForConditionalGeneration(config), [images])


def emu3(video: bool) -> Case:
    codes = {f"<|visual token {i:06d}|>": 900 + i for i in range(64)}
    pictures = transformers.Emu3VQVAEConfig(
        **CODES, hidden_size=32, num_attention_heads=1, temporal_downsample_factor=1
    )
    config = transformers.Emu3Config(
        vq_config=pictures,
        text_config=text(transformers.Emu3TextConfig, attention_dropout=0.0),
        vocabulary_map={"<image>": IMAGE, "<|extra_200|>": BREAK, **codes},
    )
    images = [
        Media(
            # A newline after every row, the last one too.
            [START, lines(h, w, IMAGE), IMAGE, END],
            {"pixel_values": pixels(1, 3, 2 * h, 2 * w), "image_sizes": torch.tensor([[2 * h, 2 * w]])},
        )
        for h, w in SIZES
    ]
    return Case(transformers.Emu3ForConditionalGeneration(config), [images])


def apertus1p5(video: bool) -> Case:
    pictures, sounds = CODES["codebook_size"], 8  # whose embeddings lie after those of words
    audio = transformers.WavTokenizerEncoderConfig(
        num_filters=4, hidden_size=32, codebook_dim=32, codebook_size=sounds, num_lstm_layers=1
    )
    config = transformers.Apertus1p5Config(
        text_config=text(
            transformers.Apertus1p5TextConfig, vocab_size=VOCAB + pictures + sounds, output_vocab_size=VOCAB
        ),
        vision_config=transformers.Apertus1p5VisionTokenizerConfig(**CODES),
        audio_config=audio,
        image_token_id=IMAGE,
        audio_token_id=AUDIO,
        image_token_offset=VOCAB,
        audio_token_offset=VOCAB + pictures,
    )
    images = [
        Media(
            [START, lines(h, w, BREAK), END],
            {"pixel_values": pixels(1, 3, 2 * h, 2 * w), "image_sizes": torch.tensor([[2 * h, 2 * w]])},
        )
        for h, w in SIZES
    ]
    return Case(transformers.Apertus1p5ForConditionalGeneration(config), [images])


def fuyu(video: bool) -> Case:
    settings = text(dict)
    del settings["num_key_value_heads"], settings["head_dim"]
    config = transformers.FuyuConfig(
        image_size=32,
        patch_size=4,
        num_channels=3,
        hidden_size=64,
        text_config=transformers.PersimmonConfig(**settings),
        image_token_id=IMAGE,
    )
    model = transformers.FuyuForCausalLM(config)
    name = pixels_name(model, "image_patches")
    images = [Media([lines(h, w, BREAK), BREAK], {name: pixels(1, h * w, 48)}) for h, w in SIZES]
    return Case(model, [images], axes={name: 1})


def molmo2(video: bool) -> Case:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    heads = {"num_key_value_heads": 2, "head_dim": 16}
    config = transformers.Molmo2Config(
        vision_config=transformers.Molmo2VisionConfig(
            **vision, **heads, image_size=[16, 16], patch_size=4, num_position_embeddings=16
        ),
        adapter_config=transformers.Molmo2AdapterConfig(
            vision_feature_layer=[-1, -2],
            hidden_size=32,
            num_attention_heads=2,
            intermediate_size=48,
            text_hidden_size=64,
            **heads,
        ),
        text_config=text(transformers.Molmo2TextConfig, vocab_size=980, additional_vocab_size=20),
        image_start_token_id=START,
        low_res_image_start_token_id=OTHER,
        image_end_token_id=END,
        image_patch_id=IMAGE,
        frame_start_token_id=VIDEO_START,
        frame_end_token_id=VIDEO_END,
    )
    model = transformers.Molmo2ForConditionalGeneration(config)
    media = []
    for number, (h, w) in enumerate(SIZES):
        if video:  # three frames of 5 x 4 tokens, without break tokens
            parts = [p for f in range(3) for p in (10, 11, VIDEO_START, square(5, 4, frame=f), VIDEO_END)]
            inputs = {
                "pixel_values_videos": pixels(3, 16, 48),
                "video_token_pooling": torch.randint(0, 48, (60, 4)) + 48 * number,
                "video_grids": torch.tensor([[3, 5, 4]]),
            }
        else:  # a coarse view of 5 x 4 tokens, then a fine one of h x w
            parts = [OTHER, lines(5, 4, BREAK, tile=0), BREAK, END, START, lines(h, w, BREAK, tile=1), BREAK, END]
            inputs = {
                "pixel_values": pixels(3, 16, 48),
                "image_token_pooling": torch.randint(0, 48, (20 + h * w, 4)) + 48 * number,
                "image_grids": torch.tensor([[5, 4, h, w]]),
            }
        media.append(Media(parts, inputs))
    return Case(model, [media], extra=lambda ids, rows: {"mm_token_type_ids": (ids == IMAGE).long()})


def step3p7(video: bool) -> Case:
    decoder = text(
        transformers.Step3p7TextConfig,
        num_local_experts=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        share_expert_dim=32,
        sliding_window=48,
        num_sliding_attention_heads=4,
        layer_types=["full_attention", "sliding_attention"],
        mlp_layer_types=["dense", "sparse"],
    )
    vision = tower(transformers.Step3p7VisionConfig, 128, hidden_size=16, mlp_ratio=2.0, max_position_embeddings=1024)
    config = transformers.Step3p7Config(vision_config=vision, text_config=decoder, image_token_id=IMAGE)
    model = transformers.Step3p7ForConditionalGeneration(config)
    cut = Media(
        # Two tiles of 5 x 5 tokens, then the whole image.
        [p for tile in range(2) for p in (OTHER, square(5, 5, tile=tile), BREAK)] + [START, square(8, 8, tile=2), END],
        {"pixel_values": pixels(1, 3, 128, 128), "pixel_values_local": pixels(2, 3, 80, 80), "num_local_patches": [2]},
    )
    uncut = Media([START, square(8, 8), END], {"pixel_values": pixels(1, 3, 128, 128), "num_local_patches": [0]})
    return Case(model, [[cut, uncut]])


def unlimited_ocr(video: bool) -> Case:
    from transformers.models.unlimited_ocr import configuration_unlimited_ocr as configurations

    encoder = tower(configurations.UnlimitedOcrVisionEncoderConfig, 64, 16)
    config = transformers.UnlimitedOcrConfig(
        vision_config=configurations.UnlimitedOcrVisionConfig(
            sam_config=tower(configurations.UnlimitedOcrSamVisionConfig, 64, **FINE), encoder_config=encoder
        ),
        text_config=text(
            configurations.UnlimitedOcrTextConfig,
            layer_types=["full_attention", "reference_sliding_attention"],
            sliding_window=8,
            **DECODER,
        ),
        image_token_id=IMAGE,
    )
    cut = Media(
        # Three columns and one row of tiles put together, the whole image, and a token that ends the view.
        [lines(4, 12, IMAGE, tile=0), IMAGE, lines(4, 4, IMAGE, tile=1), IMAGE, IMAGE],
        {
            "pixel_values": pixels(1, 3, 64, 64),
            "pixel_values_local": pixels(3, 3, 64, 64),
            "num_local_patches": [3],
            "patches_grid": [(3, 1)],
        },
    )
    uncut = Media(
        [lines(4, 4, IMAGE), IMAGE, IMAGE],
        {"pixel_values": pixels(1, 3, 64, 64), "num_local_patches": [0], "patches_grid": [(1, 1)]},
    )
    return Case(transformers.UnlimitedOcrForConditionalGeneration(config), [[cut, uncut]], few=[cut])


# ---- Gemma 4


def patches_of(frames: int, h: int, w: int, patch_px: int, pooled: int) -> tuple[Tensor, Tensor]:
    """Pixels `[frames, n, 3 * patch_px**2]` of frames of `h x w` tokens, and places `(x, y)` `[frames, n, 2]`."""
    rows, columns = h * pooled, w * pooled
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    places = torch.stack([x.flatten(), y.flatten()], -1)[None].repeat(frames, 1, 1)
    return torch.rand(frames, rows * columns, 3 * patch_px**2), places


def gemma(name: str, video: bool, vision: dict[str, Any], decoder: dict[str, Any], patch_px: int, pooled: int) -> Case:
    config = getattr(transformers, f"{name}Config")(
        text_config=text(
            getattr(transformers, f"{name}TextConfig"),
            num_hidden_layers=4,
            layer_types=["sliding_attention", "full_attention"] * 2,
            sliding_window=48,
            **decoder,
        ),
        vision_config=getattr(transformers, f"{name}VisionConfig")(**vision),
        audio_config=None,
        image_token_id=IMAGE,
        video_token_id=VIDEO_TOKEN,
        boi_token_id=START,
        eoi_token_id=END,
        audio_token_id=AUDIO,
    )
    model, media = getattr(transformers, f"{name}ForConditionalGeneration")(config), []
    for h, w in SIZES:
        values, places = patches_of(3 if video else 1, h, w, patch_px, pooled)
        if video:
            frames = [p for f in range(3) for p in (10, START, square(h, w, 1, VIDEO_TOKEN, frame=f), END)]
            inputs: dict[str, Any] = {
                "pixel_values_videos": values,
                "video_position_ids": places,
                "num_frames_per_video": torch.tensor([3]),
            }
            if "num_frames_per_video" not in inspect.signature(model.model.get_video_features).parameters:
                # transformers 5.16 has an axis of videos instead.
                inputs = {"pixel_values_videos": values[None], "video_position_ids": places[None]}
            media.append(Media(frames, inputs))
        else:
            media.append(Media([START, square(h, w), END], {"pixel_values": values, "image_position_ids": places}))

    def types(ids: Tensor, rows: Sequence[Sequence[Media]]) -> dict[str, Tensor]:
        return {"mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO_TOKEN).long()}

    fill = {"image_position_ids": -1, "video_position_ids": -1}
    return Case(model, [media], extra=types, fill=fill)


def gemma4(video: bool) -> Case:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "pooling_kernel_size": 2,
        "patch_size": 4,
        "position_embedding_size": 64,
    }
    decoder = {
        "vocab_size_per_layer_input": 1000,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 2,
        "use_bidirectional_attention": "vision",
        "global_head_dim": 32,
    }
    return gemma("Gemma4", video, vision, decoder, patch_px=4, pooled=2)


def gemma4_unified(video: bool) -> Case:
    vision = {
        "pooling_kernel_size": 2,
        "patch_size": 4,
        "mm_embed_dim": 64,
        "mm_posemb_size": 64,
        "output_proj_dims": 64,
    }
    return gemma("Gemma4Unified", video, vision, {"num_kv_shared_layers": 0}, patch_px=8, pooled=1)


FAMILIES: dict[str, Callable[[bool], Case]] = {
    "apertus1p5": apertus1p5,
    "emu3": emu3,
    "fuyu": fuyu,
    "gemma4": gemma4,
    "gemma4_unified": gemma4_unified,
    "lighton_ocr": lighton_ocr,
    "molmo2": molmo2,
    "step3p7": step3p7,
    "unlimited_ocr": unlimited_ocr,
}
VIDEO = ("gemma4", "gemma4_unified", "molmo2")
