"""Images outside of the sequence: the keys of cross-attention layers, with a mask that says who sees which tile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from gazepatch.layout import Span
from tiny.models import pixels, text, tower
from tiny.prompts import IMAGE, Case, Media

SIDE, ROOM = 6, 4  # keys along the side of a tile; tiles that an image has room for
TILE = 1 + SIDE * SIDE  # a class token and a square


def tiled(shape: int, tiles: int) -> Media:
    """An image of `tiles` tiles; `shape` is the number of their arrangement, counted from 1."""
    picture = torch.zeros(1, ROOM, 3, SIDE * 4, SIDE * 4)
    picture[:, :tiles] = pixels(1, tiles, 3, SIDE * 4, SIDE * 4)
    there = (torch.arange(ROOM) < tiles).long()[None]
    inputs = {"pixel_values": picture, "aspect_ratio_ids": torch.tensor([shape]), "aspect_ratio_mask": there}
    return Media([IMAGE], inputs)


def tiles_of(media: Media) -> int:
    return int(media.inputs["aspect_ratio_mask"].sum())


def seen_after(ids: Tensor, rows: Sequence[Sequence[Media]]) -> dict[str, Tensor]:
    """A mask by which every token sees the images before it."""
    mask = torch.zeros(*ids.shape, max(map(len, rows)), ROOM, dtype=torch.long)
    for row, media in enumerate(rows):
        places = (ids[row] == IMAGE).nonzero()[:, 0].tolist()
        for number, (place, image) in enumerate(zip(places, media, strict=True)):
            mask[row, place:, number, : tiles_of(image)] = 1
    return {"cross_attention_mask": mask}


def spans_among_keys(rows: Sequence[Sequence[Media]]) -> list[Span]:
    """Where the tiles that there are lie among the keys of each row."""
    return [
        Span(row, start + 1, start + TILE, (1, SIDE, SIDE), number, tile)
        for row, media in enumerate(rows)
        for number, image in enumerate(media)
        for tile in range(tiles_of(image))
        for start in [(number * ROOM + tile) * TILE]
    ]


def mllama(video: bool) -> Case:
    vision: dict[str, Any] = {
        "num_global_layers": 1,
        "attention_heads": 2,
        "intermediate_layers_indices": [0, 1],
        "vision_output_dim": 96,
    }
    decoder = text(transformers.MllamaTextConfig, num_hidden_layers=4, cross_attention_layers=[1, 3])
    config = transformers.MllamaConfig(
        vision_config=tower(transformers.MllamaVisionConfig, SIDE * 4, **vision),
        text_config=decoder,
        image_token_index=IMAGE,
    )
    model = transformers.MllamaForConditionalGeneration(config)
    for name, gate in model.named_parameters():  # which untrained models have closed
        if "gate" in name.rsplit(".", 1)[-1] or name.endswith(".gate"):
            nn.init.constant_(gate, 1.0)
    images = [tiled(shape=2, tiles=2), tiled(shape=7, tiles=3)]
    return Case(model, [images], extra=seen_after, stacked=True, among_keys=spans_among_keys)


FAMILIES: dict[str, Callable[[bool], Case]] = {"mllama": mllama}
VIDEO = ()
