"""Images of any size whose size in tokens follows from an argument that comes with the pixels, each family's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gazepatch.adapters.base import AS_IMAGES, FULL_ONLY, RECURRENT, Adapter, Captured, Declared, between, integers
from gazepatch.layout import Block, Media, Skip, Span

Call = Mapping[str, Any]
#: Configuration and arguments -> the images or videos of a batch, or None where an argument is missing.
Reader = Callable[[Any, Call], Sequence[Media] | None]


@dataclass(frozen=True, kw_only=True)
class Sized(Declared):
    """Images and videos are laid out as `image` and `video` read them out of the arguments."""

    images: str = "any size, one run"
    image: Reader
    video: Reader = lambda config, call: None

    def media(self, config: Any, modality: str, call: Call) -> Sequence[Media] | None:
        return (self.image if modality == "image" else self.video)(config, call)


def sizes_px(cell_px: Callable[[Any], int], row_gap: int = 0, newlines: bool = False) -> Reader:
    """From `image_sizes` in pixels and the side of a token's cell; with newlines there is one after the last row."""

    def read(config: Any, call: Call) -> Sequence[Media] | None:
        if (sizes := call.get("image_sizes")) is None:
            return None
        side = cell_px(config)
        grids = [(1, h // side, w // side) for h, w in integers(sizes)]
        return [[Block(grid, row_gap=row_gap, newlines=newlines)] for grid in grids]

    return read


def _merged(config: Any) -> int:
    return int(config.vision_config.patch_size * config.spatial_merge_size)


def _halved(config: Any) -> int:
    """A VQ encoder halves the picture between two of its levels."""
    return int(2 ** (len(config.vq_config.channel_multiplier) - 1))


def shapes(config: Any, call: Call) -> Sequence[Media] | None:
    """LFM2-VL: sizes of tiles in patches, rounded up to whole tokens."""
    if (sizes := call.get("spatial_shapes")) is None:
        return None
    factor = config.downsample_factor
    return [[Block((1, math.ceil(h / factor), math.ceil(w / factor)))] for h, w in integers(sizes)]


def halves(config: Any, call: Call) -> Sequence[Media] | None:
    """Nemotron: sizes in patches, four of which make a token."""
    if (sizes := call.get("image_grid_hw")) is None:
        return None
    return [[Block((1, h // 2, w // 2))] for h, w in integers(sizes)]


def tubelets(config: Any, call: Call) -> Sequence[Media] | None:
    """Nemotron: the frames of a video are packed by twos, all videos of a call are of one size."""
    if (pixels := call.get("pixel_values_videos")) is None or pixels.dim() != 5:
        return None
    side = 2 * config.vision_config.patch_size
    grid = 1, pixels.shape[-2] // side, pixels.shape[-1] // side
    return [[Block(grid, frame=frame) for frame in range(pixels.shape[1])]] * len(pixels)


def slices(name: str) -> Reader:
    """MiniCPM-V: sizes of slices, or of the frames of a video, in patches, of which 16 or 4 make a token."""

    def read(config: Any, call: Call) -> Sequence[Media] | None:
        if (sizes := call.get(name)) is None:
            return None
        side = 2 if (call.get("downsample_mode") or config.downsample_mode) == "4x" else 4
        return [[Block((1, h // side, w // side))] for h, w in integers(sizes)]

    return read


def places(config: Any, frames: Any) -> list[tuple[int, int, int]]:
    """Gemma 4: grids of images or frames, out of the places `(x, y)` of their patches; -1 is padding."""
    pooled = 1 if config.model_type == "gemma4_unified" else config.vision_config.pooling_kernel_size
    corners = [[max(axis) + 1 for axis in zip(*of_frame, strict=True)] for of_frame in integers(frames)]
    return [(1, rows // pooled, columns // pooled) for columns, rows in corners]


def gemma_images(config: Any, call: Call) -> Sequence[Media] | None:
    if (positions := call.get("image_position_ids")) is None:
        return None
    return [[Block(grid)] for grid in places(config, positions)]


def gemma_videos(config: Any, call: Call) -> Sequence[Media] | None:
    if (positions := call.get("video_position_ids")) is None:
        return None
    counts = integers(call.get("num_frames_per_video"))
    if counts is None:  # transformers 5.16 has an axis of videos instead
        videos = [places(config, frames) for frames in positions]
    else:
        frames = iter(places(config, positions))
        videos = [[next(frames) for _ in range(count)] for count in counts]
    return [[Block(grid, frame=number) for number, grid in enumerate(video)] for video in videos]


def step(config: Any, call: Call) -> Sequence[Media] | None:
    """Step 3: tiles of one size, then the whole image at another."""
    cell_px = 4 * config.vision_config.patch_size
    whole, tile = (_grid(call.get(name), cell_px) for name in ("pixel_values", "pixel_values_local"))
    counts = integers(call.get("num_local_patches")) or [0] * len(call["pixel_values"])
    return [[*(Block(tile, tile=i) for i in range(count)), Block(whole, tile=count or None)] for count in counts]


def _grid(pixels: Any, cell_px: int) -> tuple[int, int, int]:
    """Of pictures `[N, 3, height, width]` of one size; without any, of none."""
    return (0, 0, 0) if pixels is None else (1, pixels.shape[-2] // cell_px, pixels.shape[-1] // cell_px)


def unlimited(config: Any, call: Call) -> Sequence[Media] | None:
    """Unlimited-OCR: all tiles together, the whole image, each with newlines, and a token that ends the view."""
    cell_px = 4 * config.vision_config.sam_config.patch_size
    side = call["pixel_values"].shape[-1] // cell_px
    counts = integers(call.get("num_local_patches")) or [0] * len(call["pixel_values"])
    media: list[Media] = []
    for i, count in enumerate(counts):
        tiles: list[Block] = []
        if count:
            columns, rows = integers(call["patches_grid"][i])
            tile = call["pixel_values_local"].shape[-1] // cell_px
            tiles = [Block((1, rows * tile, columns * tile), row_gap=1, newlines=True, tile=0)]
        media.append([*tiles, Block((1, side, side), row_gap=1, newlines=True, tile=1 if count else None), Skip(1)])
    return media


def molmo_images(config: Any, call: Call) -> Sequence[Media] | None:
    """Molmo 2: a coarse view, then a fine one, with a break token after each row."""
    if (grids := call.get("image_grids")) is None:
        return None
    views = [((1, *grid[:2]), (1, *grid[2:])) for grid in integers(grids)]
    return [[Block(grid, row_gap=1, tile=tile) for tile, grid in enumerate(of_image)] for of_image in views]


def molmo_videos(config: Any, call: Call) -> Sequence[Media] | None:
    if (grids := call.get("video_grids")) is None:
        return None
    return [[Block((1, h, w), frame=frame) for frame in range(t)] for t, h, w in integers(grids)]


class Molmo(Sized):
    """The frames of a video have the tokens of images, between marks of their own."""

    token_id_names = AS_IMAGES

    def positions(self, config: Any, modality: str, ids: Sequence[int]) -> list[int]:
        return between(ids, config.frame_start_token_id, config.frame_end_token_id, config.image_token_id, modality)


class Nemotron(Sized):
    """The frames of a video have the tokens of images. A prompt has one of them, as in transformers itself."""

    token_id_names = AS_IMAGES

    def _locate(self, config: Any, modality: str, ids: Sequence[Sequence[int]], captured: Captured) -> list[Span]:
        held = "video" if "video" in captured else "image"
        return super()._locate(config, modality, ids, captured) if modality == held else []


IN_ROWS, SLICES, FRAMES = "any size, rows with break tokens", "tiles of any size", "frame by frame"

ADAPTERS: tuple[Adapter, ...] = (
    Sized(("mistral3",), images=IN_ROWS, image=sizes_px(_merged, row_gap=1)),
    Sized(("apertus1p5",), images=IN_ROWS, image=sizes_px(lambda c: c.vision_config.spatial_scale_factor, row_gap=1)),
    Sized(("lighton_ocr",), image=sizes_px(_merged)),
    Sized(("emu3",), images="any size, rows with newlines", image=sizes_px(_halved, row_gap=1, newlines=True)),
    Sized(("gemma4", "gemma4_unified"), videos=FRAMES, layers=FULL_ONLY, image=gemma_images, video=gemma_videos),
    Sized(("step3p7",), images="tiles of one size, then the whole image", layers=FULL_ONLY, image=step),
    Sized(
        ("unlimited_ocr",),
        images="all tiles, then the whole image, with newlines",
        layers=FULL_ONLY,
        no_context="the windows of its other layers would count them",
        image=unlimited,
    ),
    Molmo(
        ("molmo2",),
        images="coarse and fine view, rows with break tokens",
        videos=FRAMES,
        image=molmo_images,
        video=molmo_videos,
    ),
    Nemotron(("nemotron_h_omni",), videos=FRAMES, layers=FULL_ONLY, no_context=RECURRENT, image=halves, video=tubelets),
    Sized(("lfm2_vl",), images=SLICES, layers=FULL_ONLY, no_context=RECURRENT, image=shapes),
    Sized(
        ("minicpmv4_6", "minicpmv4_7", "minicpm_ocr"),
        images=SLICES,
        videos=FRAMES,
        layers=FULL_ONLY,
        no_context=RECURRENT,
        image=slices("target_sizes"),
        video=slices("target_sizes_videos"),
    ),
)
