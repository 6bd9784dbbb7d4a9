"""What gazepatch must know of postcards: a stamp of four tokens, then one square of patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gazepatch.adapters.base import Adapter
from gazepatch.layout import Block, Media, Skip

STAMP = 4


class Postcard(Adapter):
    """Every run of image tokens is one image."""

    model_types = ("postcard",)
    images = "one square after a stamp"

    def run(self, config: Any, modality: str, tokens: int) -> Sequence[Media] | None:
        side = config.vision_config.image_size // config.vision_config.patch_size
        return [[Skip(STAMP), Block((1, side, side))]] if tokens == STAMP + side * side else None


ADAPTER = Postcard()
