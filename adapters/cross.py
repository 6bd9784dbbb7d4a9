"""Images outside of the sequence: the keys of cross-attention layers, which stay as they are after the prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gazepatch.adapters.base import Adapter, Captured, Declared, integers
from gazepatch.layout import Block, Media, Skip, Span, features, lay


class Mllama(Declared):
    """Every image has room for the same number of tiles, and as many keys for each of them, used or not.

    Spans count places among the keys of a row, as nothing of an image is in the sequence.
    """

    cross_attention = True
    repeated_in_answers = ("cross_attention_mask",)

    def cross_layers(self, config: Any) -> tuple[int, ...]:
        return tuple(sorted(self.text_config(config).cross_attention_layers))

    def dense_reasons(self, config: Any) -> dict[int, str]:
        layers = set(range(self.text_config(config).num_hidden_layers)) - set(self.cross_layers(config))
        return super().dense_reasons(config) | dict.fromkeys(layers, "self-attention layer: its keys are text")

    def cross_spans(self, config: Any, keys: int) -> list[Span]:
        images, rest = divmod(keys, features([_image(config)]))
        return [Span(0, 0, keys, None, 0)] if rest else lay([_image(config)] * images, range(keys), row=0)

    def locate(self, config: Any, ids: Sequence[Sequence[int]], captured: Captured) -> list[Span]:
        """Spans of the tiles that there are, by row and place among its keys, from the shapes of the images."""
        shapes = captured.get("image", {}).get("aspect_ratio_ids")
        # Shape 0 stands for no image, where other rows have more of them.
        tiles = [0, *map(math.prod, config.vision_config.supported_aspect_ratios)]
        keys = features([_image(config)])
        return [
            span
            for row, of_row in enumerate([] if shapes is None else integers(shapes))
            for span in lay([_image(config)] * len(of_row), range(len(of_row) * keys), row)
            if span.tile is not None and span.tile < tiles[of_row[span.media]]
        ]


def _image(config: Any) -> Media:
    """The keys of one image: a class token and a square for each tile."""
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    tiles = range(vision.max_num_tiles)
    return [piece for tile in tiles for piece in (Skip(1), Block((1, side, side), tile=tile))]


ADAPTERS: tuple[Adapter, ...] = (
    Mllama(
        ("mllama",),
        images="tiles of one square each, outside of the sequence",
        layers="cross-attention layers",
        no_context="its cross-attention reads what its vision tower made, and no token of the sequence stands there",
    ),
)
