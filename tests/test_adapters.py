"""Every adapter against a tiny model of its family: where the visual tokens are, and which layers can gaze."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tiny import BREAK, CORE, FAMILIES, IMAGE, VIDEO, VIDEO_TOKEN, Case, batch, built, filled, repeated, text, type_of
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from gazepatch.adapters.base import Adapter
from gazepatch.layout import Span, lay
from gazepatch.registry import adapter_for

CASES = [(name, False) for name in FAMILIES] + [(name, True) for name in VIDEO]
#: Those whose images are tokens of the sequence.
IN_SEQUENCE = [(name, video) for name, video in CASES if not adapter_for(type_of(name)).across]
IDS, SEQUENCE_IDS = ([f"{name}-video" if video else name for name, video in some] for some in (CASES, IN_SEQUENCE))
CORE_IDS = [name for name in IDS if name.removesuffix("-video") in CORE]
core_case = pytest.mark.parametrize("case", [(n, v) for n, v in CASES if n in CORE], ids=CORE_IDS, indirect=True)
every_case = pytest.mark.parametrize("case", CASES, ids=IDS, indirect=True)
every_sequence = pytest.mark.parametrize("case", IN_SEQUENCE, ids=SEQUENCE_IDS, indirect=True)

# Later versions encode the images before they repeat the rows for beam search.
ENCODES_FIRST = hasattr(transformers.GenerationMixin, "_prepare_multimodal_encoder_kwargs_for_generation")

Captured = dict[str, dict[str, Any]]


@pytest.fixture
def cases() -> Callable[[str, bool], Case]:
    return built


@pytest.fixture
def case(request: pytest.FixtureRequest, cases: Callable[[str, bool], Case]) -> Case:
    return cases(*request.param)


@contextmanager
def capturing(model: Any) -> Iterator[Captured]:
    """The arguments of the outermost call of either feature function, by name."""
    captured: Captured = {}
    inside: list[str] = []
    base = model.base_model

    def wrapped(modality: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not inside:
                bound = dict(inspect.signature(function).bind(*args, **kwargs).arguments)
                captured[modality] = {**bound, **bound.pop("kwargs", {})}
            inside.append(modality)
            try:
                return function(*args, **kwargs)
            finally:
                inside.pop()

        return call

    names = {m: f"get_{m}_features" for m in ("image", "video") if hasattr(base, f"get_{m}_features")}
    for modality, name in names.items():
        setattr(base, name, wrapped(modality, getattr(base, name)))
    try:
        yield captured
    finally:
        for name in names.values():
            delattr(base, name)


@torch.no_grad()
def captured_by(case: Case, call: Callable[..., Any], **settings: Any) -> Captured:
    if adapter_of(case).across:  # its forward encodes the images itself
        return {"image": case.inputs}
    with capturing(case.model) as captured:
        call(**case.inputs, **settings)
    return dict(captured)


def id_lists(case: Case) -> list[list[int]]:
    ids, mask = case.inputs["input_ids"], case.inputs["attention_mask"]
    return ids.masked_fill(mask == 0, -1).tolist()


def adapter_of(case: Case) -> Adapter:
    return adapter_for(case.model.config.model_type)


def located(case: Case, captured: Mapping[str, Any]) -> list[Span]:
    return adapter_of(case).locate(case.model.config, id_lists(case), captured)


def unknown(case: Case, spans: Sequence[Span]) -> bool:
    """Whether spans without a grid take up exactly the tokens that carry features."""
    carrying = {
        (row, p) for row, ids in enumerate(id_lists(case)) for p, i in enumerate(ids) if i in (IMAGE, VIDEO_TOKEN)
    }
    held = [(span.row, position) for span in spans for position in span.positions()]
    return all(span.grid is None for span in spans) and len(held) == len(set(held)) and set(held) == carrying


# ---- where the tokens are


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


def test_equal_prompts_with_different_images_are_not_taken_for_repetitions(cases: Callable[[str, bool], Case]) -> None:
    config = cases("qwen2_vl", False).model.config
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


def test_images_and_videos_in_one_row(cases: Callable[[str, bool], Case]) -> None:
    image, video = cases("qwen3_vl", False), cases("qwen3_vl", True)
    mixed = filled(replace(image, rows=[[image.rows[0][0], *video.rows[0], image.rows[0][1]]]))
    captured = captured_by(mixed, mixed.model)
    assert set(captured) == {"image", "video"}
    assert located(mixed, captured) == mixed.spans
    assert [span.media for span in mixed.spans] == [0, 1, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_any_resolution_as_the_model_packs_it(cases: Callable[[str, bool], Case], name: str) -> None:
    case = cases(name, False)
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


# ---- what cannot be known


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
def test_mismatch(cases: Callable[[str, bool], Case], name: str) -> None:
    lengths, sizes, expected = QWEN_MISMATCHES[name]
    ids = [7, *(token for length in lengths for token in [*[IMAGE] * length, 8])]
    grids = torch.tensor([(1, 2 * h, 2 * w) for h, w in sizes]).reshape(-1, 3)
    config = cases("qwen2_vl", False).model.config
    spans = adapter_for("qwen2_vl").locate(config, [ids], {"image": {"image_grid_thw": grids}})
    assert [span.grid for span in spans] == expected
    assert [span.stop - span.start for span in spans] == lengths
    assert [span.media for span in spans] == ([0, 0] if name == "text inside an image" else list(range(len(lengths))))


@pytest.mark.parametrize("end", ["start", "stop"])
def test_a_run_at_the_edge_of_a_chunk_may_be_half_an_image(cases: Callable[[str, bool], Case], end: str) -> None:
    ids = [[IMAGE] * 60 + [7]] if end == "start" else [[7] + [IMAGE] * 60]
    config = cases("qwen2_vl", False).model.config
    captured = {"image": {"image_grid_thw": torch.tensor([[1, 12, 20], [1, 16, 16]])}}
    assert [span.grid for span in adapter_for("qwen2_vl").locate(config, ids, captured)] == [None]


def test_one_bad_row_leaves_the_other_its_grids(cases: Callable[[str, bool], Case]) -> None:
    config = cases("llava", False).model.config
    ids = [[1, *[IMAGE] * 64, 2, 3], [1, *[IMAGE] * 63, 2, 3, 4]]
    spans = adapter_for("llava").locate(config, ids, {})
    assert [(span.row, span.grid) for span in spans] == [(0, (1, 8, 8)), (1, None)]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_adjacent_images(cases: Callable[[str, bool], Case], count: int) -> None:
    ids = [[1, *[IMAGE] * (64 * count), 2]]
    apart = adapter_for("llava").locate(cases("llava", False).model.config, ids, {})
    assert [(span.start, span.media, span.tile) for span in apart] == [(1 + 64 * i, i, None) for i in range(count)]
    tiles = adapter_for("internvl").locate(cases("internvl", False).model.config, ids, {})
    numbered = [None] if count == 1 else list(range(count))
    assert [(span.start, span.media, span.tile) for span in tiles] == [
        (1 + 64 * i, 0, t) for i, t in enumerate(numbered)
    ]


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


# ---- the order of the tokens

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
def test_features_come_row_by_row(cases: Callable[[str, bool], Case], name: str) -> None:
    case = cases(name, False)
    grids = [[part.grid for part in media.parts if not isinstance(part, int)] for media in case.rows[0]]
    single, (_, h, w) = next((m, grids[0]) for m, grids in zip(case.rows[0], grids, strict=True) if len(grids) == 1)
    inputs = {key: value[None] if case.stacked else value for key, value in single.inputs.items()}
    cells = [(y, x) for y in range(h) for x in range(w) if y != x]
    moved = features_moved(case, inputs, [cell(y, x, inputs["pixel_values"].shape[-1] // w) for y, x in cells])
    lead = int(name == "llava_full")
    assert share(moved, [lead + y * w + x for y, x in cells]) > 0.4
    assert share(moved, [lead + x * h + y for y, x in cells]) < 0.1


def test_tiles_of_any_resolution_are_one_picture_row_by_row(cases: Callable[[str, bool], Case]) -> None:
    case = cases("llava_next", False)
    base, fine = [part for part in case.rows[0][0].parts if not isinstance(part, int)]
    assert base.grid == (1, 6, 6) and fine.grid == (1, 10, 12)
    # 12 rows of cells in 2 x 2 tiles of 6 x 6; the first and the last of them are padding.
    cells = [(y, x) for y in range(1, 11) for x in range(12)]
    index = [(0, 1 + y // 6 * 2 + x // 6, *cell(y % 6, x % 6, 4)) for y, x in cells]
    moved = features_moved(case, {key: value[:1] for key, value in case.rows[0][0].inputs.items()}, index)
    assert share(moved, [36 + (y - 1) * 13 + x for y, x in cells]) > 0.4


# ---- the decoder


def shape_of(call: Mapping[str, Any], config: Any) -> tuple[int, ...]:
    """Of the embeddings that a decoder is called with; Chameleon's makes them itself."""
    embeddings = call.get("inputs_embeds")
    return (*call["input_ids"].shape, config.hidden_size) if embeddings is None else tuple(embeddings.shape)


@every_case
def test_decoder(case: Case) -> None:
    adapter, model = adapter_of(case), case.model
    decoder = adapter.decoder(model)
    assert decoder.config is adapter.text_config(model.config) is model.config.get_text_config(decoder=True)
    assert adapter.decoder(model.base_model) is decoder
    assert len(decoder.layers) == decoder.config.num_hidden_layers
    seen: list[tuple[int, ...]] = []
    hook = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(shape_of(kwargs, decoder.config)), with_kwargs=True
    )
    with torch.no_grad():
        model(**case.inputs)
    hook.remove()
    assert seen == [(*case.inputs["input_ids"].shape, decoder.config.hidden_size)]


SLIDING, FULL = "sliding_attention layer", None
LATENTS = "keys and values are made of latents (MLA) in a way that nobody has looked at"

TEXT_DECODERS: dict[str, tuple[Callable[[], Any], list[str | None]]] = {
    "llama": (text, [FULL] * 2),
    "mistral with a window": (lambda: text(transformers.MistralConfig, sliding_window=8), [SLIDING] * 2),
    "mistral without": (lambda: text(transformers.MistralConfig, sliding_window=None), [FULL] * 2),
    "ministral3": (lambda: text(transformers.Ministral3Config), [FULL] * 2),
    "phi3 with a window": (lambda: text(transformers.Phi3Config, sliding_window=8), [SLIDING] * 2),
    "qwen2": (lambda: text(transformers.Qwen2Config, sliding_window=8), [FULL] * 2),
    "qwen2 with windows": (
        lambda: text(transformers.Qwen2Config, use_sliding_window=True, sliding_window=8, max_window_layers=1),
        [FULL, SLIDING],
    ),
    "gemma2, soft caps": (lambda: text(transformers.Gemma2Config), [SLIDING, FULL]),
    "gpt_oss, sinks": (lambda: text(transformers.GptOssConfig), [SLIDING, FULL]),
    "mimo_v2_flash": (lambda: text(transformers.MiMoV2FlashConfig), [FULL, SLIDING]),
    "deepseek_v3": (lambda: text(transformers.DeepseekV3Config), [FULL] * 2),
    "mistral4": (lambda: text(transformers.Mistral4Config), [FULL] * 2),
    "longcat_flash": (lambda: text(transformers.LongcatFlashConfig), [LATENTS] * 2),
    "llama4": (
        lambda: text(transformers.Llama4TextConfig, num_hidden_layers=4),
        ["chunked_attention layer"] * 3 + [FULL],
    ),
}


@pytest.mark.parametrize("name", TEXT_DECODERS)
def test_any_text_decoder(name: str) -> None:
    make, expected = TEXT_DECODERS[name]
    config = transformers.LlavaConfig(text_config=make())
    adapter = adapter_for("llava")
    assert adapter.text_config(config).num_hidden_layers == len(expected)
    assert adapter.dense_reasons(config) == {i: reason for i, reason in enumerate(expected) if reason}
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(config)
    assert adapter.decoder(model) is adapter.decoder(model.base_model) is model.base_model.language_model
    assert adapter.decoder(model).config is config.get_text_config(decoder=True)


@pytest.mark.parametrize("name", sorted({name for name, _ in IN_SEQUENCE}))
def test_dense_reasons_of_families(cases: Callable[[str, bool], Case], name: str) -> None:
    case = cases(name, False)
    kinds = getattr(case.model.config.get_text_config(decoder=True), "layer_types", None) or []
    expected = {i: f"{kind} layer" for i, kind in enumerate(kinds) if kind not in ("full_attention", "hybrid")}
    assert adapter_of(case).dense_reasons(case.model.config) == expected


def test_a_decoder_with_a_head_is_taken_without_it() -> None:
    with torch.device("meta"):
        headed = transformers.LlamaForCausalLM(text())
    assert adapter_for("llava").decoder(SimpleNamespace(get_decoder=lambda: headed)) is headed.model


def test_a_configuration_may_lack_a_token_id() -> None:
    adapter = adapter_for("qwen2_vl")
    assert adapter.token_ids(SimpleNamespace(image_token_id=4, video_token_id=None), "image") == (4,)
    assert adapter.token_ids(SimpleNamespace(image_token_id=4, video_token_id=None), "video") == ()
    assert adapter.token_ids(SimpleNamespace(image_token_id=4), "audio") == ()


# ---- what single families do


def test_a_compressed_video_has_no_grid(cases: Callable[[str, bool], Case]) -> None:
    case = cases("video_llama_3", True)
    ids = id_lists(case)[0]
    compressed = [token for i, token in enumerate(ids) if not (token == VIDEO_TOKEN and i % 7 == 0)]
    captured = {"video": {name: value for name, value in case.inputs.items() if name.startswith("video")}}
    spans = adapter_of(case).locate(case.model.config, [compressed], captured)
    assert spans and all(span.grid is None for span in spans)
    assert sum(span.tokens for span in spans) == compressed.count(VIDEO_TOKEN)


def test_the_frames_of_a_chunk_of_kimi_are_one(cases: Callable[[str, bool], Case]) -> None:
    config, adapter = cases("kimi_k25", True).model.config, adapter_for("kimi_k25")
    grids = torch.tensor([[4, 12, 20], [3, 12, 20]])
    ids = [[1, *[VIDEO_TOKEN] * 60, 2, *[VIDEO_TOKEN] * 60, 2]]
    spans = adapter.locate(config, ids, {"video": {"video_grid_thw": grids}})
    assert [(span.start, span.grid, span.media, span.frame) for span in spans] == [
        (1, (1, 6, 10), 0, None),
        (62, (1, 6, 10), 1, None),
    ]


def test_fine_tiles_of_granite_docling_have_twice_the_side(cases: Callable[[str, bool], Case]) -> None:
    config, adapter = cases("granite_docling", False).model.config, adapter_for("granite_docling")
    ids = [[1, *[IMAGE] * 16, 2, *[IMAGE] * 64, 2, *[IMAGE] * 32, 2]]
    grids = [span.grid for span in adapter.locate(config, ids, {})]
    assert grids == [(1, 4, 4), (1, 8, 8), (1, 4, 4), (1, 4, 4)]


def test_rows_of_fuyu_that_differ_have_no_grid(cases: Callable[[str, bool], Case]) -> None:
    config, adapter = cases("fuyu", False).model.config, adapter_for("fuyu")
    spans = adapter.locate(config, [[*[IMAGE] * 5, BREAK, *[IMAGE] * 5, BREAK, *[IMAGE] * 4, 7, 8]], {})
    assert [(span.start, span.stop, span.grid) for span in spans] == [(0, 5, None), (6, 11, None), (12, 16, None)]


def test_images_and_videos_with_the_same_token(cases: Callable[[str, bool], Case]) -> None:
    image, video = cases("glm4v", False), cases("glm4v", True)
    mixed = filled(replace(image, rows=[[image.rows[0][0], *video.rows[0], image.rows[0][1]]]))
    captured = {kind: {f"{kind}_grid_thw": mixed.inputs[f"{kind}_grid_thw"]} for kind in ("image", "video")}
    assert located(mixed, captured) == mixed.spans
