"""Tiny vision-language models with random weights, and prompts for them, without any file from outside.

    case = tiny("qwen2_vl")                    # images
    case = tiny("qwen2_vl", video=True)        # videos, for the families in VIDEO
    pair = batch(case)                         # two rows, left-padded, with different numbers of images
    case.model.generate(**case.inputs, max_new_tokens=4)

`case.spans` is written down here by hand from what each family's processor does, not computed by an adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from gazepatch.layout import Grid, Span

VOCAB, PAD, BOS = 1000, 0, 1
IMAGE, VIDEO_TOKEN, START, END, BREAK = 990, 991, 992, 993, 994


# ---- prompts


@dataclass(frozen=True)
class Piece:
    """One expected span: its token ids from the first visual token to the last one, and what the span says of them."""

    ids: Sequence[int]
    grid: Grid
    row_gap: int = 0
    tile: int | None = None
    frame: int | None = None


@dataclass(frozen=True)
class Media:
    """One image or video of a prompt: its tokens (pieces and single ids) and what its processor hands to the model."""

    parts: Sequence[Piece | int]
    inputs: dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A model with inputs for it and the spans they hold.

    Attributes:
        rows: The images or videos of each row of `inputs`.
        few, many: Rows for `batch`.
        extra: Further inputs, made from the token ids `[B, S]` and the rows.
        stacked: Inputs have a batch axis before that of the images (Idefics 3), padded with zeros.
    """

    model: Any = field(repr=False)
    rows: Sequence[Sequence[Media]]
    few: Sequence[Media] = ()
    many: Sequence[Media] = ()
    extra: Callable[[Tensor, Sequence[Sequence[Media]]], dict[str, Tensor]] = lambda ids, rows: {}
    stacked: bool = False
    inputs: dict[str, Tensor] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)


def square(h: int, w: int, t: int = 1, token: int = IMAGE, **names: int) -> Piece:
    """A grid whose tokens follow each other."""
    return Piece([token] * (t * h * w), (t, h, w), **names)


def lines(h: int, w: int, gap: int, **names: int) -> Piece:
    """A grid with the id `gap` between its rows."""
    return Piece(([IMAGE] * w + [gap]) * (h - 1) + [IMAGE] * w, (1, h, w), row_gap=1, **names)


def prompt(media: Sequence[Media], row: int, generator: torch.Generator) -> tuple[list[int], list[Span]]:
    """Token ids of one row, with a few words around each image, and the spans in it."""

    def words(count: int) -> list[int]:
        return torch.randint(3, 900, (count,), generator=generator).tolist()

    ids, spans = [BOS, *words(4)], []
    for number, item in enumerate(media):
        for part in item.parts:
            if isinstance(part, int):
                ids.append(part)
                continue
            start, stop = len(ids), len(ids) + len(part.ids)
            spans.append(Span(row, start, stop, part.grid, number, part.tile, part.frame, part.row_gap))
            ids += part.ids
        ids += words(3)
    return ids + words(5), spans


def filled(case: Case) -> Case:
    """The case with `inputs` and `spans` made from its rows, padded on the left."""
    generator = torch.Generator().manual_seed(7)
    prompts = [prompt(media, row, generator) for row, media in enumerate(case.rows)]
    longest = max(len(ids) for ids, _ in prompts)
    padded = [[PAD] * (longest - len(ids)) + ids for ids, _ in prompts]
    spans = [
        replace(span, start=span.start + longest - len(ids), stop=span.stop + longest - len(ids))
        for ids, of_row in prompts
        for span in of_row
    ]
    input_ids = torch.tensor(padded)
    inputs = {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long(), **case.extra(input_ids, case.rows)}
    for name in {name for media in case.rows for item in media for name in item.inputs}:
        of_rows = [[item.inputs[name] for item in media if name in item.inputs] for media in case.rows]
        joined = [joined_with_padding(tensors) for tensors in of_rows if tensors]
        inputs[name] = joined_with_padding([one[None] for one in joined] if case.stacked else joined)
    return replace(case, inputs=inputs, spans=spans)


def joined_with_padding(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenation on the first axis; the others are padded with zeros, behind, to the largest."""
    largest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    enlarged = [tensor.new_zeros(len(tensor), *largest) for tensor in tensors]
    for room, tensor in zip(enlarged, tensors, strict=True):
        room[tuple(map(slice, tensor.shape))] = tensor
    return torch.cat(enlarged)


def batch(case: Case) -> Case:
    """The same model with two rows: the first with fewer images (or videos) than the second, and padded on the left."""
    return filled(replace(case, rows=(case.few or case.rows[0][:1], case.many or case.rows[0])))


def repeated(case: Case, times: int) -> Case:
    """Every row of a case so many times in a row, as beam search does; the pixels are those of the case."""
    rows = len(case.inputs["input_ids"])
    ids = {name: case.inputs[name].repeat_interleave(times, 0) for name in ("input_ids", "attention_mask")}
    spans = [
        replace(span, row=row * times + i)
        for row in range(rows)
        for i in range(times)
        for span in case.spans
        if span.row == row
    ]
    return replace(case, inputs={**case.inputs, **ids}, spans=spans)


# ---- models


def tiny(name: str, video: bool = False, seed: int = 0) -> Case:
    """A tiny model of one of `FAMILIES` or `SHORT`, with a prompt of one row."""
    torch.manual_seed(seed)
    if video and name not in VIDEO:
        raise ValueError(f"expected one of {', '.join(VIDEO)} for videos, got {name}")
    case = (FAMILIES | SHORT)[name](video)
    model = case.model.eval()
    redraw(model, torch.Generator().manual_seed(seed + 1))
    settings = model.generation_config
    settings.eos_token_id, settings.pad_token_id, settings.bos_token_id, settings.do_sample = None, PAD, BOS, False
    return filled(case)


@torch.no_grad()
def redraw(model: nn.Module, generator: torch.Generator) -> None:
    """Draw larger weights: with the usual ones attention is uniform, and nothing would notice what is left out."""
    for weight in model.parameters():
        if weight.dim() >= 2:
            fan_in = weight[0].numel()
            weight.copy_(torch.randn(weight.shape, generator=generator) * min(0.5, 1.5 / math.sqrt(fan_in)))


def text(kind: type = transformers.LlamaConfig, **settings: Any) -> Any:
    """Configuration of a text decoder: two query heads share a key head."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024}
    special = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": 2}
    return kind(**{**sizes, **heads, **special, **settings})


def tower(kind: type, image_size: Any, patch_size: Any = 4, **settings: Any) -> Any:
    """Configuration of a vision tower for square images of `image_size` pixels."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return kind(**{**sizes, "image_size": image_size, "patch_size": patch_size, **settings})


def pixels(*shape: int) -> Tensor:
    """A picture of noise."""
    return torch.randn(shape)


# ---- squares: llava, vipllava, gemma3, idefics3, smolvlm, internvl


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


# ---- rows: mistral3 (and llava with a Pixtral tower)


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


# ---- any resolution: llava_next, llava_onevision


def anyres(tiles: int, size_px: tuple[int, int], *parts: Piece | int) -> Media:
    """An image of `size_px` pixels cut into `tiles` tiles of 24 x 24 pixels, behind the base tile of 6 x 6 tokens."""
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


# ---- grids: qwen2_vl, qwen2_5_vl, qwen3_vl

PATCHES: dict[str, Any] = {
    "depth": 2,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
MARKS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO_TOKEN,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def qwen(model: nn.Module, video: bool, frames_apart: bool = False) -> Case:
    """Two images of 8 x 8 and 7 x 11 tokens, or two videos."""
    media = []
    for t, h, w in ((3, 6, 10), (2, 5, 4)) if video else ((1, 8, 8), (1, 7, 11)):
        token = VIDEO_TOKEN if video else IMAGE
        kind, values = ("video", "pixel_values_videos") if video else ("image", "pixel_values")
        inputs = {
            values: pixels(t * h * w * 4, 3 * 2 * 4 * 4),
            f"{kind}_grid_thw": torch.tensor([[t, 2 * h, 2 * w]]),
        }
        pieces = [square(h, w, t, token)]
        if frames_apart and video:
            pieces = [square(h, w, 1, token, frame=frame) for frame in range(t)]
        # The words behind START and END stand for timestamps.
        media.append(Media([part for piece in pieces for part in (10, 11, START, piece, END)], inputs))

    def types(ids: Tensor, rows: Sequence[Sequence[Media]]) -> dict[str, Tensor]:
        return {"mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO_TOKEN).long()}

    return Case(model, [media], extra=types)


def qwen2_vl(video: bool) -> Case:
    config = transformers.Qwen2VLConfig(
        vision_config={**PATCHES, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
        text_config=text(transformers.Qwen2VLTextConfig, rope_parameters=MROPE),
        **MARKS,
    )
    return qwen(transformers.Qwen2VLForConditionalGeneration(config), video)


def qwen2_5_vl(video: bool) -> Case:
    own = {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48, "window_size": 16}
    config = transformers.Qwen2_5_VLConfig(
        vision_config={**PATCHES, **own, "fullatt_block_indexes": [1]},
        text_config=text(transformers.Qwen2_5_VLTextConfig, rope_parameters=MROPE),
        **MARKS,
    )
    return qwen(transformers.Qwen2_5_VLForConditionalGeneration(config), video)


def qwen3_vl(video: bool) -> Case:
    own = {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48, "num_position_embeddings": 64}
    config = transformers.Qwen3VLConfig(
        vision_config={**PATCHES, **own, "deepstack_visual_indexes": [0, 1]},
        text_config=text(transformers.Qwen3VLTextConfig, rope_parameters=MROPE),
        **MARKS,
    )
    return qwen(transformers.Qwen3VLForConditionalGeneration(config), video, frames_apart=True)


FAMILIES: dict[str, Callable[[bool], Case]] = {
    "gemma3": gemma3,
    "idefics3": idefics3,
    "internvl": internvl,
    "llava": llava,
    "llava_full": llava_full,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "llava_pixtral": llava_pixtral,
    "mistral3": mistral3,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen2_vl": qwen2_vl,
    "qwen3_vl": qwen3_vl,
    "smolvlm": smolvlm,
    "vipllava": vipllava,
}
#: Sliding windows that are shorter than an image.
SHORT: dict[str, Callable[[bool], Case]] = {"gemma3_short": gemma3_short, "internvl_short": internvl_short}
VIDEO = ("llava_onevision", "qwen2_5_vl", "qwen2_vl", "qwen3_vl")
