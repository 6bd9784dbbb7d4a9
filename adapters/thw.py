"""Images and videos of any size, whose `(t, h, w)` grids in patches come with the pixels (Qwen-VL)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gazepatch.adapters.base import Adapter, integers
from gazepatch.layout import Block, Media


@dataclass(frozen=True)
class Thw(Adapter):
    """Grids are arguments named `image_grid_thw` and `video_grid_thw`; squares of patches are merged into one token.

    Args:
        model_types: Model types laid out so.
        frames: The frames of a video are laid out one by one, with text (timestamps) between them.
    """

    model_types: tuple[str, ...]
    frames: bool = False

    def media(self, config: Any, modality: str, call: Mapping[str, Any]) -> Sequence[Media] | None:
        if (grids := call.get(f"{modality}_grid_thw")) is None:
            return None
        merge = config.vision_config.spatial_merge_size
        tokens = [(t, h // merge, w // merge) for t, h, w in integers(grids)]
        if self.frames and modality == "video":
            return [[Block((1, h, w), frame=frame) for frame in range(t)] for t, h, w in tokens]
        return [[Block(grid)] for grid in tokens]


ADAPTERS = (
    Thw(("qwen2_vl", "qwen2_5_vl")),
    Thw(("qwen3_vl",), frames=True),
)
