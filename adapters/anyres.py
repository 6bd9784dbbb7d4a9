"""Images of any resolution: the whole image at the tower's size, then its tiles put together with a newline column.

Source: LLaVA-NeXT, https://llava-vl.github.io/blog/2024-01-30-llava-next/
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from gazepatch.adapters.base import Adapter, Declared, integers
from gazepatch.layout import Block, Media, Skip


class LlavaNext(Declared):
    """Base tile (tile 0), then the tiles of the best resolution without their padding (tile 1)."""

    def media(self, config: Any, modality: str, call: Mapping[str, Any]) -> Sequence[Media] | None:
        if modality != "image" or (sizes_px := call.get("image_sizes")) is None:
            return None
        return [self._tiled(config, call, size_px) for size_px in integers(sizes_px)]

    def _tiled(self, config: Any, call: Mapping[str, Any], size_px: Sequence[int]) -> Media:
        side = self._side(config)
        h, w = self._shrunk(config, call, *_unpadded(config, side, size_px))
        return [Block((1, side, side), tile=0), Block((1, h, w), row_gap=1, newlines=True, tile=1)]

    def _side(self, config: Any) -> int:
        """Tokens along the side of one tile."""
        return int(config.vision_config.image_size // config.vision_config.patch_size)

    def _shrunk(self, config: Any, call: Mapping[str, Any], h: int, w: int) -> tuple[int, int]:
        """Size of tile 1 in tokens."""
        return h, w

    def _frames(self, side: int, call: Mapping[str, Any]) -> tuple[int, Block] | None:
        """The number of videos, and the frames of one, pooled to `side` tokens each."""
        # transformers 5.16 calls the pixels of a video by the name of those of an image.
        if (pixels := call.get("pixel_values_videos", call.get("pixel_values"))) is None:
            return None
        videos, frames = pixels.shape[:2]
        return videos, Block((frames, side, side))


class LlavaNextVideo(LlavaNext):
    """LLaVA-NeXT with videos of frames pooled two by two."""

    def media(self, config: Any, modality: str, call: Mapping[str, Any]) -> Sequence[Media] | None:
        if modality == "image":
            return super().media(config, modality, call)
        found = self._frames(self._side(config) // 2, call)
        return None if found is None else [[found[1]]] * found[0]


class Granite4Vision(LlavaNext):
    """LLaVA-NeXT with some of the patches along the side of a tile."""

    def _side(self, config: Any) -> int:
        return int(super()._side(config) * Fraction(config.downsample_rate))


class LlavaOnevision(LlavaNext):
    """LLaVA-NeXT with a limit on tile 1, samples of several untiled images, and videos of pooled frames."""

    def media(self, config: Any, modality: str, call: Mapping[str, Any]) -> Sequence[Media] | None:
        if modality == "video":
            found = self._frames(math.ceil(self._side(config) / 2), call)
            return None if found is None else [[found[1], Skip(1)]] * found[0]
        tiled = super().media(config, modality, call)
        if tiled is None or (images_of_samples := call.get("batch_num_images")) is None:
            return tiled
        # Only an image that is alone in its sample is cut into tiles. Every other one ends with one newline.
        alone = [n == 1 for n in integers(images_of_samples) for _ in range(n)]
        side = self._side(config)
        whole: Media = [Block((1, side, side)), Skip(1)]
        return [media if single else whole for media, single in zip(tiled, alone, strict=False)]

    def _shrunk(self, config: Any, call: Mapping[str, Any], h: int, w: int) -> tuple[int, int]:
        limit = call.get("vision_aspect_ratio") or config.vision_aspect_ratio  # "anyres_max_9": 9 times the base tile
        ratio = math.sqrt(h * w / (int(limit.removeprefix("anyres_max_")) * self._side(config) ** 2))
        return (int(h // ratio), int(w // ratio)) if ratio > 1.1 else (h, w)


def _unpadded(config: Any, side: int, size_px: Sequence[int]) -> tuple[int, int]:
    """`(h, w)` in tokens of all tiles of an image put together, without the padding around it."""
    import torch
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    pinpoints = [list(point) for point in config.image_grid_pinpoints]
    rows, columns = get_anyres_image_grid_shape(list(size_px), pinpoints, config.vision_config.image_size)
    padded = torch.empty(1, rows * side, columns * side, device="meta")
    h, w = unpad_image(padded, list(size_px)).shape[1:]
    return h, w


TILES = "base square and tiles with newlines, padding cut off"

ADAPTERS: tuple[Adapter, ...] = (
    LlavaNext(("llava_next",), images=TILES),
    LlavaNextVideo(("llava_next_video",), images=TILES, videos="one run a video"),
    LlavaOnevision(("llava_onevision",), images=TILES, videos="one run a video"),
    Granite4Vision(("granite4_vision",), images=TILES),
)
