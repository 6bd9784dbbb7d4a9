"""Images, tiles and frames of one fixed square grid each, known from the configuration alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gazepatch.adapters.base import Adapter, integers
from gazepatch.layout import Block, Media, Skip

# Vision towers whose features under the strategy "full" are all patches.
NO_CLASS_TOKEN = ("siglip_vision_model", "siglip2_vision_model")


@dataclass(frozen=True)
class Squares(Adapter):
    """A run of tokens holds whole squares.

    Tiles and frames with text between them count as images of their own: only the words of the prompt would tell which
    belong together.

    Args:
        model_types: Model types laid out so.
        side: Configuration -> tokens along the side of a square.
        tiles: Several squares in one run are the tiles of one image, not several images.
        lead: Configuration -> tokens before each square that are no part of it (the class token of the vision tower).
    """

    model_types: tuple[str, ...]
    side: Callable[[Any], int]
    tiles: bool = False
    lead: Callable[[Any], int] = lambda config: 0

    def run(self, config: Any, modality: str, tokens: int) -> Sequence[Media] | None:
        side, lead = self.side(config), self.lead(config)
        count, rest = divmod(tokens, side * side + lead)
        if rest:
            return None
        grid = (1, side, side)
        if self.tiles and count > 1:
            return [[Block(grid, tile=tile) for tile in range(count)]]
        return [[Skip(lead), Block(grid)]] * count


class Llava(Squares):
    """LLaVA, whose Pixtral towers lay images of any size out in rows, with a break token behind each."""

    def media(self, config: Any, modality: str, call: Mapping[str, Any]) -> Sequence[Media] | None:
        if config.vision_config.model_type != "pixtral" or (sizes_px := call.get("image_sizes")) is None:
            return None
        cell_px = config.vision_config.patch_size
        return [[Block((1, h // cell_px, w // cell_px), row_gap=1)] for h, w in integers(sizes_px)]


def _patches(config: Any) -> int:
    return int(config.vision_config.image_size // config.vision_config.patch_size)


def _class_token(config: Any) -> int:
    full = getattr(config, "vision_feature_select_strategy", "default") == "full"
    return int(full and config.vision_config.model_type not in NO_CLASS_TOKEN)


def _shuffled(config: Any) -> int:
    return int(config.vision_config.image_size[0] // config.vision_config.patch_size[0] * config.downsample_ratio)


ADAPTERS = (
    Llava(("llava", "vipllava"), _patches, lead=_class_token),
    Squares(("gemma3",), lambda config: math.isqrt(config.mm_tokens_per_image)),
    Squares(("idefics3", "smolvlm"), lambda config: _patches(config) // config.scale_factor),
    Squares(("internvl",), _shuffled, tiles=True),
)
