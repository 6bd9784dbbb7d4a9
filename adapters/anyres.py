"""Images of any resolution: the whole image at the tower's size, then its tiles put together with a newline column.

Source: LLaVA-NeXT, https://llava-vl.github.io/blog/2024-01-30-llava-next/
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gazepatch.adapters.base import Adapter, integers
from gazepatch.layout import Block, Media, Skip


class LlavaNext(Adapter):
    """Base tile (tile 0), then the tiles of the best resolution without their padding (tile 1)."""

    model_types = ("llava_next",)

    def media(self, config: Any, modality: str, call: Mapping[str, Any]) -> Sequence[Media] | None:
        if modality != "image" or (sizes_px := call.get("image_sizes")) is None:
            return None
        return [self._tiled(config, call, size_px) for size_px in integers(sizes_px)]

    def _tiled(self, config: Any, call: Mapping[str, Any], size_px: Sequence[int]) -> Media:
        side = _side(config)
        h, w = self._shrunk(config, call, *_unpadded(config, size_px))
        return [Block((1, side, side), tile=0), Block((1, h, w), row_gap=1, newlines=True, tile=1)]

    def _shrunk(self, config: Any, call: Mapping[str, Any], h: int, w: int) -> tuple[int, int]:
        """Size of tile 1 in tokens."""
        return h, w


class LlavaOnevision(LlavaNext):
    """LLaVA-NeXT with a limit on tile 1, samples of several untiled images, and videos of pooled frames."""

    model_types = ("llava_onevision",)

    def media(self, config: Any, modality: str, call: Mapping[str, Any]) -> Sequence[Media] | None:
        if modality == "video":
            return self._videos(config, call)
        tiled = super().media(config, modality, call)
        if tiled is None or (images_of_samples := call.get("batch_num_images")) is None:
            return tiled
        # Only an image that is alone in its sample is cut into tiles. Every other one ends with one newline.
        alone = [n == 1 for n in integers(images_of_samples) for _ in range(n)]
        side = _side(config)
        whole: Media = [Block((1, side, side)), Skip(1)]
        return [media if single else whole for media, single in zip(tiled, alone, strict=False)]

    def _videos(self, config: Any, call: Mapping[str, Any]) -> Sequence[Media] | None:
        # transformers 5.16 calls the pixels of a video by the name of those of an image.
        if (pixels := call.get("pixel_values_videos", call.get("pixel_values"))) is None:
            return None
        videos, frames = pixels.shape[:2]
        side = math.ceil(_side(config) / 2)
        return [[Block((frames, side, side)), Skip(1)]] * videos

    def _shrunk(self, config: Any, call: Mapping[str, Any], h: int, w: int) -> tuple[int, int]:
        limit = call.get("vision_aspect_ratio") or config.vision_aspect_ratio  # "anyres_max_9": 9 times the base tile
        ratio = math.sqrt(h * w / (int(limit.removeprefix("anyres_max_")) * _side(config) ** 2))
        return (int(h // ratio), int(w // ratio)) if ratio > 1.1 else (h, w)


def _side(config: Any) -> int:
    """Tokens along the side of one tile."""
    return int(config.vision_config.image_size // config.vision_config.patch_size)


def _unpadded(config: Any, size_px: Sequence[int]) -> tuple[int, int]:
    """`(h, w)` in tokens of all tiles of an image put together, without the padding around it."""
    import torch
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    tile_px, side = config.vision_config.image_size, _side(config)
    pinpoints = [list(point) for point in config.image_grid_pinpoints]
    rows, columns = get_anyres_image_grid_shape(list(size_px), pinpoints, tile_px)
    padded = torch.empty(1, rows * side, columns * side, device="meta")
    h, w = unpad_image(padded, list(size_px)).shape[1:]
    return h, w


ADAPTERS = (LlavaNext(), LlavaOnevision())
