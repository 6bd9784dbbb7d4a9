"""Images and videos of any size, whose `(t, h, w)` grids in patches come with the pixels (Qwen-VL)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gazepatch.adapters.base import (
    AS_IMAGES,
    CONVOLUTIONS,
    FULL_ONLY,
    RECURRENT,
    Adapter,
    Declared,
    between,
    hybrid_reasons,
    integers,
)
from gazepatch.layout import Block, Media, Skip

JOINED, APART = "one run a video", "frame by frame"


@dataclass(frozen=True, kw_only=True)
class Thw(Declared):
    """Grids are arguments named `image_grid_thw` and `video_grid_thw`; squares of patches are merged into one token.

    Args:
        merge: Configuration -> patches along the side of a token.
        frames_a_step: Configuration -> frames of a video that are merged into one.
    """

    images: str = "merged patches of any size"
    videos: str = JOINED
    merge: Callable[[Any], int] = lambda config: config.vision_config.spatial_merge_size
    frames_a_step: Callable[[Any], int] = lambda config: 1

    def media(self, config: Any, modality: str, call: Mapping[str, Any]) -> Sequence[Media] | None:
        if (grids := call.get(f"{modality}_grid_thw")) is None:
            return None
        steps = self.frames_a_step(config) if modality == "video" else 1
        merges = self.merges(config, modality, call) or [self.merge(config)] * len(grids)
        tokens = [(t // steps, h // m, w // m) for (t, h, w), m in zip(integers(grids), merges, strict=True)]
        return [self.pieces(grid, modality == "video" and self.videos == APART) for grid in tokens]

    def merges(self, config: Any, modality: str, call: Mapping[str, Any]) -> Sequence[int]:
        """Patches along the side of a token, for every image or video where they differ."""
        return ()

    def pieces(self, grid: tuple[int, int, int], apart: bool) -> Media:
        """One image or video of `(t, h, w)` tokens, its frames `apart` or together."""
        t, h, w = grid
        return [Block((1, h, w), frame=frame) for frame in range(t)] if apart else [Block(grid)]


class VideoLlama3(Thw):
    """Every image and video says itself how many patches are merged. A compressed video has no grid."""

    def merges(self, config: Any, modality: str, call: Mapping[str, Any]) -> Sequence[int]:
        merges: Sequence[int] = integers(call[f"{modality}_merge_sizes"])
        return merges


class Kimi(Thw):
    """The frames of a chunk of a video, which has a grid of its own, are averaged into one."""

    def pieces(self, grid: tuple[int, int, int], apart: bool) -> Media:
        return super().pieces((1, *grid[1:]), apart=False)


class HunYuan(Thw):
    """A feature begins the image, one ends every row of it, and one ends the image."""

    def pieces(self, grid: tuple[int, int, int], apart: bool) -> Media:
        return [Skip(1), Block(grid, row_gap=1, newlines=True), Skip(1)]


class Glm(Thw):
    """The frames of a video have the tokens of images, between a token that starts the video and one that ends it."""

    token_id_names = AS_IMAGES

    def positions(self, config: Any, modality: str, ids: Sequence[int]) -> list[int]:
        return between(ids, config.video_start_token_id, config.video_end_token_id, config.image_token_id, modality)


class Inkling2(Thw):
    """Grids count tokens. Layers of full attention have short convolutions beside it."""

    def dense_reasons(self, config: Any) -> dict[int, str]:
        return hybrid_reasons(self.text_config(config))


def _muse_merge(config: Any) -> int:
    return int(config.vision_config.merge_size)


def _kimi_merge(config: Any) -> int:
    return int(config.vision_config.merge_kernel_size[0])


ADAPTERS: tuple[Adapter, ...] = (
    Thw(("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker", "hyperclovax_vision_v2")),
    Thw(("qwen3_vl", "qwen3_vl_moe", "cosmos3_omni", "cosmos3_edge"), videos=APART),
    Thw(("qwen3_5", "qwen3_5_moe", "lfm3_vl"), videos=APART, layers=FULL_ONLY, no_context=RECURRENT),
    Thw(("exaone4_5",), layers=FULL_ONLY),
    Thw(("cohere_compass",), videos=APART, layers=FULL_ONLY),
    Thw(("muse_glimmer", "muse_spark"), videos=APART, layers=FULL_ONLY, merge=_muse_merge),
    Thw(("ernie4_5_vl_moe",), frames_a_step=lambda config: config.vision_config.temporal_merge_size),
    Thw(("paddleocr_vl",), videos=""),
    VideoLlama3(("video_llama_3",), videos=APART),
    Thw(
        ("minimax_m3_vl",),
        videos=APART,
        layers=FULL_ONLY,
        no_context="its block-sparse layers would count them",
    ),
    # Before transformers 5.24 itself, chunks of more than one frame fail.
    Kimi(("kimi_k25",), videos="chunk by chunk", merge=_kimi_merge),
    Glm(("glm4v", "glm46v", "glmga", "glm4v_moe", "glm_ocr"), videos=APART),
    Inkling2(
        ("inkling2", "inkling2_loop"),
        videos="",
        layers=FULL_ONLY,
        no_context=CONVOLUTIONS,
        images="any size, one run",
        merge=lambda config: 1,
    ),
    HunYuan(("hunyuan_vl",), images="merged patches of any size, rows with newlines", videos=""),
)
