"""Two images or videos whose grids come with the pixels, and settings that such families share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tiny.models import pixels
from tiny.prompts import END, IMAGE, START, VIDEO_END, VIDEO_START, VIDEO_TOKEN, Case, Media, square

PATCHES: dict[str, Any] = {
    "depth": 2,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
MARKS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO_TOKEN,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 48}
WINDOWED = {
    **PATCHES,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "intermediate_size": 48,
    "window_size": 16,
    "fullatt_block_indexes": [1],
}
DEEP = {
    **PATCHES,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "intermediate_size": 48,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
}

IMAGES = ((1, 8, 8), (1, 7, 11))
VIDEOS = ((3, 6, 10), (2, 5, 4))
#: Numbers of one patch: of two frames, or of one.
PAIR, ONE = 3 * 2 * 4 * 4, 3 * 4 * 4


def grids(
    model: nn.Module,
    video: bool,
    patch: Sequence[int] = (PAIR,),
    merge: int = 2,
    apart: bool = False,
    as_images: bool = False,
    types: bool = True,
    sizes: Sequence[tuple[int, int, int]] = (),
    frames_a_step: int = 1,
    more: Callable[[int, int, int], dict[str, Any]] = lambda t, h, w: {},
    extra: Callable[[Tensor], dict[str, Tensor]] = lambda ids: {},
) -> Case:
    """Two images, or two videos, of the sizes above in tokens.

    Args:
        model: Of the family.
        video: Whether to make videos.
        patch: Shape of the pixels of one patch.
        merge: Patches along the side of a token.
        apart: Frames are laid out one by one, with words (timestamps) between them.
        as_images: And their tokens have the id of images, between marks of their own.
        types: The model is told which tokens are images and videos.
        sizes: Others in their place.
        frames_a_step: Frames that make up one step in time.
        more: Further inputs of an image or video of `(t, h, w)` tokens.
        extra: Further inputs, made from the token ids `[B, S]`.
    """
    media = []
    for t, h, w in sizes or (VIDEOS if video else IMAGES):
        token = VIDEO_TOKEN if video and not as_images else IMAGE
        kind, values = ("video", "pixel_values_videos") if video else ("image", "pixel_values")
        patches = t * frames_a_step if video else t
        inputs = {
            values: pixels(patches * h * w * merge**2, *patch),
            f"{kind}_grid_thw": torch.tensor([[patches, merge * h, merge * w]]),
            **more(t, h, w),
        }
        pieces = [square(h, w, t, token)]
        if apart and video:
            pieces = [square(h, w, 1, token, frame=frame) for frame in range(t)]
        # The words after START and END stand for timestamps.
        parts = [part for piece in pieces for part in (10, 11, START, piece, END)]
        media.append(Media([VIDEO_START, *parts, VIDEO_END] if as_images and video else parts, inputs))

    def inputs_of(ids: Tensor, rows: Sequence[Sequence[Media]]) -> dict[str, Tensor]:
        visual = (ids == IMAGE).long() * (2 if as_images and video else 1) + 2 * (ids == VIDEO_TOKEN).long()
        return extra(ids) | ({"mm_token_type_ids": visual} if types else {})

    return Case(model, [media], extra=inputs_of)
