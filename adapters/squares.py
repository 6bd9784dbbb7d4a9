"""Images, tiles and frames of one fixed square grid each, known from the configuration alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gazepatch.adapters.base import Adapter, integers
from gazepatch.layout import Block, Media, Skip


@dataclass(frozen=True)
class Squares(Adapter):
    """A run of tokens holds whole squares.

    Tiles and frames with text between them count as images of their own: only the words of the prompt would tell which
    belong together.

    Args:
        model_types: Model types laid out so.
        side: Configuration -> tokens along the side of a square.
        tiles: Several squares in one run are the tiles of one image, not several images.
        class_token: The vision tower's class token may come before each square.
    """

    model_types: tuple[str, ...]
    side: Callable[[Any], int]
    tiles: bool = False
    class_token: bool = False

    def run(self, config: Any, modality: str, tokens: int) -> Sequence[Media] | None:
        side = self.side(config)
        # Whether there is a class token depends on the tower, the strategy and the call; the length of the run tells.
        for lead in (0, 1) if self.class_token else (0,):
            count, rest = divmod(tokens, side * side + lead)
            if not rest:
                return self._squares(side, count, [Skip(lead)] if lead else [])
        return None

    def _squares(self, side: int, count: int, lead: Media) -> Sequence[Media]:
        grid = (1, side, side)
        if self.tiles and count > 1:
            return [[Block(grid, tile=tile) for tile in range(count)]]
        return [[*lead, Block(grid)]] * count


class Llava(Squares):
    """LLaVA, whose Pixtral towers lay images of any size out in rows, with a break token behind each."""

    def media(self, config: Any, modality: str, call: Mapping[str, Any]) -> Sequence[Media] | None:
        if config.vision_config.model_type != "pixtral" or (sizes_px := call.get("image_sizes")) is None:
            return None
        cell_px = config.vision_config.patch_size
        return [[Block((1, h // cell_px, w // cell_px), row_gap=1)] for h, w in integers(sizes_px)]


def _patches(config: Any) -> int:
    return config.vision_config.image_size // config.vision_config.patch_size


def _shuffled(config: Any) -> int:
    return int(config.vision_config.image_size[0] // config.vision_config.patch_size[0] * config.downsample_ratio)


ADAPTERS = (
    Llava(("llava", "vipllava"), _patches, class_token=True),
    Squares(("gemma3",), lambda config: math.isqrt(config.mm_tokens_per_image)),
    Squares(("idefics3", "smolvlm"), lambda config: _patches(config) // config.scale_factor),
    Squares(("internvl",), _shuffled, tiles=True),
)
