"""Images, tiles and frames of one fixed square grid each, known from the configuration alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gazepatch.adapters.base import FULL_ONLY, Adapter, Declared, integers
from gazepatch.layout import Block, Media, Skip

# Vision towers whose features under the strategy "full" are all patches.
NO_CLASS_TOKEN = ("siglip_vision_model", "siglip2_vision_model")


@dataclass(frozen=True, kw_only=True)
class Squares(Declared):
    """A run of tokens holds whole squares.

    Tiles and frames with text between them count as images of their own: only the words of the prompt would tell which
    belong together.

    Args:
        side: Configuration -> tokens along the side of a square.
        tiles: Several squares in one run are the tiles of one image, not several images.
        lead: Configuration -> tokens before each square that are no part of it (the class token of the vision tower).
    """

    images: str = "one square"
    side: Callable[[Any], int]
    tiles: bool = False
    lead: Callable[[Any], int] = lambda config: 0

    def run(self, config: Any, modality: str, tokens: int) -> Sequence[Media] | None:
        side, lead = self.side(config), self.lead(config)
        count, rest = divmod(tokens, side * side + lead)
        if rest:
            return None
        if modality == "video":
            return [[Block((count, side, side))]]
        grid = (1, side, side)
        if self.tiles and count > 1:
            return [[Block(grid, tile=tile) for tile in range(count)]]
        return [[Skip(lead), Block(grid)]] * count


class Llava(Squares):
    """LLaVA, whose Pixtral towers lay images of any size out in rows, with a break token after each."""

    def media(self, config: Any, modality: str, call: Mapping[str, Any]) -> Sequence[Media] | None:
        if config.vision_config.model_type != "pixtral" or (sizes_px := call.get("image_sizes")) is None:
            return None
        cell_px = config.vision_config.patch_size
        return [[Block((1, h // cell_px, w // cell_px), row_gap=1)] for h, w in integers(sizes_px)]


class PaliGemma(Squares):
    """All tokens of a prompt see each other, those of an answer only what is before them."""

    inputs_of_answers: Mapping[str, int] = {"token_type_ids": 1}


class VideoLlava(Squares):
    """A class token comes before each frame of a video."""

    def run(self, config: Any, modality: str, tokens: int) -> Sequence[Media] | None:
        if modality == "image":
            return super().run(config, modality, tokens)
        side = self.side(config)
        frames, rest = divmod(tokens, 1 + side * side)
        pieces = [(Skip(1), Block((1, side, side), frame=frame)) for frame in range(frames)]
        return None if rest else [[piece for of_frame in pieces for piece in of_frame]]


class PerceptionLM(Squares):
    """Images of one call have equally many tiles, and may stand side by side."""

    def media(self, config: Any, modality: str, call: Mapping[str, Any]) -> Sequence[Media] | None:
        pixels = call.get("pixel_values")
        if modality == "video" or pixels is None or pixels.dim() != 5:
            return None
        images, tiles = (int(size) for size in pixels.shape[:2])
        return list(self.run(config, modality, tiles * self.side(config) ** 2) or ()) * images


class GraniteDocling(Squares):
    """A tile has twice as many tokens along its side where the processor asks for fine ones."""

    def run(self, config: Any, modality: str, tokens: int) -> Sequence[Media] | None:
        fine = 2 * self.side(config)
        return [[Block((1, fine, fine))]] if tokens == fine * fine else super().run(config, modality, tokens)


def _patches(config: Any) -> int:
    return int(config.vision_config.image_size // config.vision_config.patch_size)


def _class_token(config: Any) -> int:
    full = getattr(config, "vision_feature_select_strategy", "default") == "full"
    return int(full and config.vision_config.model_type not in NO_CLASS_TOKEN)


def _shuffled(config: Any) -> int:
    return int(config.vision_config.image_size[0] // config.vision_config.patch_size[0] * config.downsample_ratio)


def _cells(config: Any) -> int:
    """Cells along the side of a picture that a VQ encoder turns into codes: it halves it between two of its levels."""
    encoder = config.vq_config
    return int(encoder.resolution // 2 ** (len(encoder.channel_multiplier) - 1))


def _perceived(config: Any) -> int:
    """timm has the size of the patches in the names of its models alone."""
    tower = config.vision_config
    patch = re.search(r"patch(\d+)", tower.architecture)
    assert patch is not None
    return int(tower.model_args["img_size"][0] // int(patch[1]) // config.projector_pooling_ratio)


def _root(name: str) -> Callable[[Any], int]:
    """The side of a square of as many tokens as the configuration says under `name`."""
    return lambda config: math.isqrt(getattr(config, name))


ONE_RUN, BETWEEN_WORDS = "tiles in one run", "tiles of one square each, split by text"

ADAPTERS: tuple[Adapter, ...] = (
    Llava(
        ("llava", "vipllava"),
        images="one square; Pixtral towers: rows with break tokens",
        side=_patches,
        lead=_class_token,
    ),
    Squares(("deepseek_vl", "deepseek_vl_hybrid", "janus"), side=_patches),
    PaliGemma(("paligemma",), side=_patches),
    Squares(("gemma3", "shieldgemma2"), side=_root("mm_tokens_per_image"), layers=FULL_ONLY),
    Squares(("gemma3n",), side=_root("vision_soft_tokens_per_image"), layers=FULL_ONLY),
    Squares(("fast_vlm",), side=_root("image_seq_length")),
    Squares(("chameleon",), side=_cells, no_context="its decoder embeds the token ids itself"),
    VideoLlava(("video_llava",), side=_patches, videos="one run a video"),
    Squares(
        ("idefics3", "smolvlm"),
        images=BETWEEN_WORDS,
        videos="as images",
        side=lambda config: _patches(config) // config.scale_factor,
    ),
    Squares(
        ("aya_vision", "cohere2_vision"),
        images=BETWEEN_WORDS,
        layers=FULL_ONLY,
        side=lambda config: _patches(config) // config.downsample_factor,
    ),
    Squares(
        ("ovis2",), images=BETWEEN_WORDS, side=lambda config: _patches(config) // config.vision_config.hidden_stride
    ),
    GraniteDocling(
        ("granite_docling",),
        images=BETWEEN_WORDS,
        side=lambda config: _patches(config) // config.vision_config.scale_factor,
    ),
    Squares(
        ("llama4",),
        images=BETWEEN_WORDS,
        layers=FULL_ONLY,
        side=lambda config: int(_patches(config) * config.vision_config.pixel_shuffle_ratio),
    ),
    Squares(("internvl", "qianfan_ocr"), images=ONE_RUN, videos="as images", side=_shuffled, tiles=True),
    Squares(("got_ocr2", "pp_chart2table"), images=ONE_RUN, side=lambda config: _patches(config) // 4, tiles=True),
    PerceptionLM(("perception_lm",), images=ONE_RUN, videos="one run a video", side=_perceived, tiles=True),
)
