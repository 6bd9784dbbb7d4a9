"""What adapters cannot know gets no grid, and what they can know around it keeps its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from locating import adapter_of, captured_by, every_sequence, id_lists, located
from tiny import IMAGE, VIDEO_TOKEN, Case, built

from gazepatch.layout import Span
from gazepatch.registry import adapter_for


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    return built(*request.param)


def unknown(case: Case, spans: Sequence[Span]) -> bool:
    """Whether spans without a grid take up exactly the tokens that carry features."""
    carrying = {
        (row, p) for row, ids in enumerate(id_lists(case)) for p, i in enumerate(ids) if i in (IMAGE, VIDEO_TOKEN)
    }
    held = [(span.row, position) for span in spans for position in span.positions()]
    return all(span.grid is None for span in spans) and len(held) == len(set(held)) and set(held) == carrying


@every_sequence
def test_without_the_call_there_is_no_grid_or_the_right_one(case: Case, request: pytest.FixtureRequest) -> None:
    spans = located(case, {})
    by_length = type(adapter_of(case)).__module__.endswith((".squares", ".patterns"))
    known = by_length and request.node.callspec.id != "llava_pixtral"
    assert spans == case.spans if known else unknown(case, spans)


@every_sequence
def test_tokens_that_fit_no_image_have_no_grid(case: Case) -> None:
    """One token is missing from the last image: nothing around it may get a wrong grid, and nothing may fail."""
    captured = captured_by(case, case.model)
    ids = id_lists(case)[0]
    last = max(position for position, token in enumerate(ids) if token in (IMAGE, VIDEO_TOKEN))
    ids[last] = -1
    spans = adapter_of(case).locate(case.model.config, [ids], captured)
    right = {(span.start, span.grid, tuple(span.positions())) for span in case.spans}
    assert all(span.grid is None or (span.start, span.grid, tuple(span.positions())) in right for span in spans)
    assert [span.stop for span in spans if span.grid is None][-1:] == [last]


QWEN_MISMATCHES = {
    "one grid does not fit": ([60, 70], [(6, 10), (8, 8)], [(1, 6, 10), None]),
    "a run is cut short": ([60, 40], [(6, 10), (8, 8)], [(1, 6, 10), None]),
    "only the second image is here": ([64], [(6, 10), (8, 8)], [(1, 8, 8)]),
    "two grids would fit": ([60], [(6, 10), (10, 6)], [None]),
    "twice the same grid": ([60], [(6, 10), (6, 10)], [(1, 6, 10)]),
    "no grids": ([60], [], [None]),
    "more runs than grids": ([60, 64, 60], [(6, 10), (8, 8)], [(1, 6, 10), (1, 8, 8), (1, 6, 10)]),
    "text inside an image": ([30, 30], [(6, 10)], [None, None]),
}


@pytest.mark.parametrize("name", QWEN_MISMATCHES)
def test_mismatch(name: str) -> None:
    lengths, sizes, expected = QWEN_MISMATCHES[name]
    ids = [7, *(token for length in lengths for token in [*[IMAGE] * length, 8])]
    grids = torch.tensor([(1, 2 * h, 2 * w) for h, w in sizes]).reshape(-1, 3)
    config = built("qwen2_vl").model.config
    spans = adapter_for("qwen2_vl").locate(config, [ids], {"image": {"image_grid_thw": grids}})
    assert [span.grid for span in spans] == expected
    assert [span.stop - span.start for span in spans] == lengths
    assert [span.media for span in spans] == ([0, 0] if name == "text inside an image" else list(range(len(lengths))))


@pytest.mark.parametrize("end", ["start", "stop"])
def test_a_run_at_the_edge_of_a_chunk_may_be_half_an_image(end: str) -> None:
    ids = [[IMAGE] * 60 + [7]] if end == "start" else [[7] + [IMAGE] * 60]
    config = built("qwen2_vl").model.config
    captured = {"image": {"image_grid_thw": torch.tensor([[1, 12, 20], [1, 16, 16]])}}
    assert [span.grid for span in adapter_for("qwen2_vl").locate(config, ids, captured)] == [None]


def test_one_bad_row_leaves_the_other_its_grids() -> None:
    config = built("llava").model.config
    ids = [[1, *[IMAGE] * 64, 2, 3], [1, *[IMAGE] * 63, 2, 3, 4]]
    spans = adapter_for("llava").locate(config, ids, {})
    assert [(span.row, span.grid) for span in spans] == [(0, (1, 8, 8)), (1, None)]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_adjacent_images(count: int) -> None:
    ids = [[1, *[IMAGE] * (64 * count), 2]]
    apart = adapter_for("llava").locate(built("llava").model.config, ids, {})
    assert [(span.start, span.media, span.tile) for span in apart] == [(1 + 64 * i, i, None) for i in range(count)]
    tiles = adapter_for("internvl").locate(built("internvl").model.config, ids, {})
    numbered = [None] if count == 1 else list(range(count))
    assert [(span.start, span.media, span.tile) for span in tiles] == [
        (1 + 64 * i, 0, t) for i, t in enumerate(numbered)
    ]


@pytest.mark.parametrize("tiles", [1, 3])
def test_adjacent_images_of_tiles(tiles: int) -> None:
    ids, call = [[1, *[IMAGE] * (36 * tiles * 2), 2]], {"image": {"pixel_values": torch.zeros(2, tiles, 3, 48, 48)}}
    spans = adapter_for("perception_lm").locate(built("perception_lm").model.config, ids, call)
    assert [span.media for span in spans] == [0] * tiles + [1] * tiles


@pytest.mark.parametrize(
    ("tower", "strategy", "tokens_of_image"),
    [
        (transformers.CLIPVisionConfig, "default", 64),
        (transformers.CLIPVisionConfig, "full", 65),
        (transformers.SiglipVisionConfig, "full", 64),
    ],
    ids=["clip", "clip-full", "siglip-full"],
)
def test_class_token(tower: type, strategy: Any, tokens_of_image: int) -> None:
    vision = tower(image_size=32, patch_size=4)
    config = transformers.LlavaConfig(
        vision_config=vision, image_token_index=IMAGE, vision_feature_select_strategy=strategy
    )
    for tokens in (63, 64, 65):
        (span,) = adapter_for("llava").locate(config, [[1, *[IMAGE] * tokens, 2]], {})
        assert span.grid == ((1, 8, 8) if tokens == tokens_of_image else None)
        assert span.stop == 1 + tokens
