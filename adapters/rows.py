"""Images of any size in rows, with a break token behind each (Pixtral's layout)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gazepatch.adapters.base import Adapter, integers
from gazepatch.layout import Block, Media


class Mistral3(Adapter):
    """One token for each merged square of patches."""

    model_types = ("mistral3",)

    def media(self, config: Any, modality: str, call: Mapping[str, Any]) -> Sequence[Media] | None:
        if (sizes_px := call.get("image_sizes")) is None:
            return None
        cell_px = config.vision_config.patch_size * config.spatial_merge_size
        return [[Block((1, h // cell_px, w // cell_px), row_gap=1)] for h, w in integers(sizes_px)]


ADAPTERS = (Mistral3(),)
