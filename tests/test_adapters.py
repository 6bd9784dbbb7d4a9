"""Every adapter against a tiny model of its family: where the visual tokens are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from locating import adapter_of, captured_by, core_case, every_case, every_sequence, id_lists, located
from tiny import BREAK, IMAGE, VIDEO_TOKEN, Case, batch, built, filled, repeated
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from gazepatch.layout import lay
from gazepatch.registry import adapter_for

# Later versions encode the images before they repeat the rows for beam search.
ENCODES_FIRST = hasattr(transformers.GenerationMixin, "_prepare_multimodal_encoder_kwargs_for_generation")


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    return built(*request.param)


@every_case
@pytest.mark.parametrize("make", [lambda case: case, batch], ids=["one row", "two rows"])
def test_spans(case: Case, make: Callable[[Case], Case]) -> None:
    made = make(case)
    direct = captured_by(made, made.model)
    assert located(made, direct) == made.spans
    in_generate = captured_by(made, made.model.generate, max_new_tokens=1)
    assert located(made, in_generate) == made.spans
    if made.among_keys is None:
        assert [span.media for span in made.spans] == [number for row in made.rows for number in numbers(row)]


def numbers(row: Sequence[Any]) -> list[int]:
    return [number for number, media in enumerate(row) for part in media.parts if not isinstance(part, int)]


@every_sequence
def test_spans_hold_the_tokens_that_carry_features(case: Case) -> None:
    spans = located(case, captured_by(case, case.model))
    ids = id_lists(case)[0]
    held = [position for span in spans for position in span.positions()]
    assert len(held) == len(set(held)) == sum(span.tokens for span in spans)
    assert {ids[position] for position in held} == {VIDEO_TOKEN if VIDEO_TOKEN in ids else IMAGE}
    carrying = sum(token in (IMAGE, VIDEO_TOKEN) for token in ids)
    loose = sum(part in (IMAGE, VIDEO_TOKEN) for media in case.rows[0] for part in media.parts if isinstance(part, int))
    newlines = sum(span.grid[1] - 1 for span in spans if span.grid and span.row_gap and BREAK not in ids)
    assert carrying == len(held) + loose + newlines


@core_case
@pytest.mark.parametrize("expanded", [False, True], ids=["pixels once", "pixels repeated"])
def test_rows_repeated_by_generation(case: Case, expanded: bool) -> None:
    pair = batch(case)
    three = repeated(pair, 3)
    if expanded:  # each row with pixels of its own
        pair = filled(replace(pair, rows=[row for row in pair.rows for _ in range(3)]))
    assert located(three, captured_by(pair, pair.model)) == three.spans


@core_case
def test_beam_search(case: Case) -> None:
    # Before they encoded first, versions put the images of a row with several in the wrong order.
    pair = batch(case) if ENCODES_FIRST else filled(replace(case, rows=[case.rows[0][:1]] * 2))
    captured = captured_by(pair, pair.model.generate, num_beams=3, max_new_tokens=1)
    three = repeated(pair, 3)
    assert located(three, captured) == three.spans


def test_equal_prompts_with_different_images_are_not_taken_for_repetitions() -> None:
    config = built("qwen2_vl").model.config
    ids = [[1, *[IMAGE] * 24, 2]] * 4
    grids = torch.tensor([[1, 8, 12], [1, 12, 8], [1, 8, 12], [1, 16, 6]])
    adapter = adapter_for("qwen2_vl")
    once = adapter.locate(config, ids, {"image": {"image_grid_thw": grids}})
    assert [span.grid for span in once] == [(1, 4, 6), (1, 6, 4), (1, 4, 6), (1, 8, 3)]
    repeated_rows = adapter.locate(config, ids, {"image": {"image_grid_thw": grids[:2]}})
    assert [span.grid for span in repeated_rows] == [(1, 4, 6), (1, 4, 6), (1, 6, 4), (1, 6, 4)]


@core_case
def test_a_later_turn_brings_only_new_tokens(case: Case) -> None:
    adapter, config = adapter_of(case), case.model.config
    assert adapter.locate(config, [[5]], {}) == []
    assert adapter.locate(config, [[5, 6, 7], [8, 9, 10]], {}) == []
    later = filled(replace(case, rows=[case.rows[0][-1:]]))
    assert located(later, captured_by(later, later.model)) == later.spans


def test_images_and_videos_in_one_row() -> None:
    image, video = built("qwen3_vl"), built("qwen3_vl", video=True)
    mixed = filled(replace(image, rows=[[image.rows[0][0], *video.rows[0], image.rows[0][1]]]))
    captured = captured_by(mixed, mixed.model)
    assert set(captured) == {"image", "video"}
    assert located(mixed, captured) == mixed.spans
    assert [span.media for span in mixed.spans] == [0, 1, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_any_resolution_as_the_model_packs_it(name: str) -> None:
    case = built(name)
    config = copy.deepcopy(case.model.config)
    config.image_grid_pinpoints = [[24 * rows, 24 * columns] for rows in range(1, 5) for columns in range(1, 5)]
    sizes_px = torch.randint(8, 300, (60, 2), generator=torch.Generator().manual_seed(3))
    tiles = [image_size_to_num_patches(size, config.image_grid_pinpoints, 24) for size in sizes_px]
    own = (
        {"vision_feature_select_strategy": "default"}
        if name == "llava_next"
        else {"vision_aspect_ratio": "anyres_max_2"}
    )
    packed, _ = type(case.model.base_model).pack_image_features(
        SimpleNamespace(config=config),
        [torch.zeros(n, 36, 1) for n in tiles],
        sizes_px,
        image_newline=torch.ones(1),
        **own,
    )
    media = adapter_of(case).media(config, "image", {"image_sizes": sizes_px}) or ()
    for made, pieces in zip(packed, media, strict=True):
        base, fine = pieces
        assert base.tokens == 36 and fine.tokens == len(made) - 36
        newlines = [position for position in range(36, len(made)) if made[position]]
        (span,) = lay([[fine]], range(36, len(made)), row=0)
        assert sorted(span.positions() + newlines) == list(range(36, len(made)))


def test_a_configuration_may_lack_a_token_id() -> None:
    adapter = adapter_for("qwen2_vl")
    assert adapter.token_ids(SimpleNamespace(image_token_id=4, video_token_id=None), "image") == (4,)
    assert adapter.token_ids(SimpleNamespace(image_token_id=4, video_token_id=None), "video") == ()
    assert adapter.token_ids(SimpleNamespace(image_token_id=4), "audio") == ()


# ---- what single families do


def test_a_compressed_video_has_no_grid() -> None:
    case = built("video_llama_3", video=True)
    ids = id_lists(case)[0]
    compressed = [token for i, token in enumerate(ids) if not (token == VIDEO_TOKEN and i % 7 == 0)]
    captured = {"video": {name: value for name, value in case.inputs.items() if name.startswith("video")}}
    spans = adapter_of(case).locate(case.model.config, [compressed], captured)
    assert spans and all(span.grid is None for span in spans)
    assert sum(span.tokens for span in spans) == compressed.count(VIDEO_TOKEN)


def test_the_frames_of_a_chunk_of_kimi_are_one() -> None:
    config, adapter = built("kimi_k25", video=True).model.config, adapter_for("kimi_k25")
    grids = torch.tensor([[4, 12, 20], [3, 12, 20]])
    ids = [[1, *[VIDEO_TOKEN] * 60, 2, *[VIDEO_TOKEN] * 60, 2]]
    spans = adapter.locate(config, ids, {"video": {"video_grid_thw": grids}})
    assert [(span.start, span.grid, span.media, span.frame) for span in spans] == [
        (1, (1, 6, 10), 0, None),
        (62, (1, 6, 10), 1, None),
    ]


def test_fine_tiles_of_granite_docling_have_twice_the_side() -> None:
    config, adapter = built("granite_docling").model.config, adapter_for("granite_docling")
    ids = [[1, *[IMAGE] * 16, 2, *[IMAGE] * 64, 2, *[IMAGE] * 32, 2]]
    grids = [span.grid for span in adapter.locate(config, ids, {})]
    assert grids == [(1, 4, 4), (1, 8, 8), (1, 4, 4), (1, 4, 4)]


def test_rows_of_fuyu_that_differ_have_no_grid() -> None:
    config, adapter = built("fuyu").model.config, adapter_for("fuyu")
    spans = adapter.locate(config, [[*[IMAGE] * 5, BREAK, *[IMAGE] * 5, BREAK, *[IMAGE] * 4, 7, 8]], {})
    assert [(span.start, span.stop, span.grid) for span in spans] == [(0, 5, None), (6, 11, None), (12, 16, None)]


def test_images_and_videos_with_the_same_token() -> None:
    image, video = built("glm4v"), built("glm4v", video=True)
    mixed = filled(replace(image, rows=[[image.rows[0][0], *video.rows[0], image.rows[0][1]]]))
    captured = {kind: {f"{kind}_grid_thw": mixed.inputs[f"{kind}_grid_thw"]} for kind in ("image", "video")}
    assert located(mixed, captured) == mixed.spans
