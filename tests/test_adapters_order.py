"""Features come in the order that adapters say: a token moves with the pixels of its cell."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import transformers
from tiny import Case, built, tiny

import gazepatch
from gazepatch.patch import patch_of

Cell = tuple[Any, ...]


def cell(y: int, x: int, size_px: int) -> Cell:
    """Index of one square cell in the last two axes of a picture."""
    return (..., *(slice(at * size_px, (at + 1) * size_px) for at in (y, x)))


def features_moved(case: Case, inputs: Mapping[str, Any], cells: Sequence[Cell]) -> list[int]:
    """For each cell of the pixels: which feature moves most when that cell changes."""

    function = case.model.base_model.get_image_features
    strategy = inspect.signature(function).parameters.get("vision_feature_select_strategy")
    if strategy is not None and strategy.default is strategy.empty:  # Llama 4 in transformers 5.16
        inputs = {**inputs, "vision_feature_select_strategy": "default"}

    @torch.no_grad()
    def features(pixels: torch.Tensor) -> torch.Tensor:
        output = function(**{**inputs, "pixel_values": pixels}, return_dict=True)
        pooled = output.last_hidden_state if output.pooler_output is None else output.pooler_output
        return torch.cat(list(pooled))

    before, moved = features(inputs["pixel_values"]), []
    for index in cells:
        changed = inputs["pixel_values"].clone()
        changed[index] *= -1
        moved.append(int((features(changed) - before).norm(dim=-1).argmax()))
    return moved


def share(found: Sequence[int], expected: Sequence[int]) -> float:
    """Share of equal numbers. Attention spreads a change, so that another token may move more now and then."""
    return sum(a == b for a, b in zip(found, expected, strict=True)) / len(expected)


#: Families whose pictures go to the model whole, so that a cell of the picture is a token.
RASTER = (
    "aya_vision",
    "cohere2_vision",
    "deepseek_vl",
    "deepseek_vl_hybrid",
    "fast_vlm",
    "gemma3",
    "gemma3n",
    "got_ocr2",
    "granite_docling",
    "idefics3",
    "internvl",
    "janus",
    "lighton_ocr",
    "llama4",
    "llava",
    "llava_full",
    "llava_pixtral",
    "mistral3",
    "ovis2",
    "paligemma",
    "qianfan_ocr",
    "smolvlm",
    "step3p7",
    "vipllava",
)


@pytest.mark.parametrize("name", RASTER)
def test_features_come_row_by_row(name: str) -> None:
    case = built(name)
    grids = [[part.grid for part in media.parts if not isinstance(part, int)] for media in case.rows[0]]
    single, (_, h, w) = next((m, grids[0]) for m, grids in zip(case.rows[0], grids, strict=True) if len(grids) == 1)
    inputs = {key: value[None] if case.stacked else value for key, value in single.inputs.items()}
    cells = [(y, x) for y in range(h) for x in range(w) if y != x]
    moved = features_moved(case, inputs, [cell(y, x, inputs["pixel_values"].shape[-1] // w) for y, x in cells])
    lead = int(name == "llava_full")
    assert share(moved, [lead + y * w + x for y, x in cells]) > 0.4
    assert share(moved, [lead + x * h + y for y, x in cells]) < 0.1


def test_tiles_of_any_resolution_are_one_picture_row_by_row() -> None:
    case = built("llava_next")
    base, fine = [part for part in case.rows[0][0].parts if not isinstance(part, int)]
    assert base.grid == (1, 6, 6) and fine.grid == (1, 10, 12)
    # 12 rows of cells in 2 x 2 tiles of 6 x 6; the first and the last of them are padding.
    cells = [(y, x) for y in range(1, 11) for x in range(12)]
    index = [(0, 1 + y // 6 * 2 + x // 6, *cell(y % 6, x % 6, 4)) for y, x in cells]
    moved = features_moved(case, {key: value[:1] for key, value in case.rows[0][0].inputs.items()}, index)
    assert share(moved, [36 + (y - 1) * 13 + x for y, x in cells]) > 0.4


@torch.no_grad()
def test_features_made_before_are_laid_out_as_their_own_image(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = []
    for size in ((1, 4, 9), (1, 9, 4)):  # as many tokens in both
        monkeypatch.setattr("tiny.thw.IMAGES", (size,))
        cases.append(tiny("qwen2_5_vl"))
    model = cases[0].model
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip(f"transformers {transformers.__version__} takes no features that were made before")
    with gazepatch.patched(model, min_visual_tokens=0):
        pixels = [(case.inputs["pixel_values"], case.inputs["image_grid_thw"]) for case in cases]
        features = [model.model.get_image_features(*of_case, return_dict=True) for of_case in pixels]
        for case, made in zip(cases, features, strict=True):
            inputs = {name: value for name, value in case.inputs.items() if name != "pixel_values"}
            cache = transformers.DynamicCache()
            model(**inputs, mm_encoder_outputs={"image": made}, past_key_values=cache)
            assert cache.gaze.spans == case.spans
        made = model.model.get_image_features(*pixels[0], return_dict=True)
        assert len(patch_of(model).runtime.running.origins._held) == 3
        del features, made
        assert len(patch_of(model).runtime.running.origins._held) == 0
