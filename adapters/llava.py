"""LLaVA and VipLLaVA: one run of a fixed square grid for each image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gazepatch.adapters.base import Adapter
from gazepatch.layout import Block, Media, Skip


class Llava(Adapter):
    """The vision tower's patches, in raster order, with its class token first under the strategy `full`."""

    model_types = ("llava", "vipllava")

    def run(self, config: Any, modality: str, tokens: int) -> Sequence[Media] | None:
        side = config.vision_config.image_size // config.vision_config.patch_size
        image: Media = [Block((1, side, side))]
        if getattr(config, "vision_feature_select_strategy", "default") == "full":
            image = [Skip(1), *image]
        length = side * side + len(image) - 1
        return [image] * (tokens // length) if tokens % length == 0 else None


ADAPTERS = (Llava(),)
