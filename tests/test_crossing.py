"""Images that are the keys of cross-attention layers (Llama 3.2 Vision): what is read, against the definition."""

from __future__ import annotations

import pytest
import torch
from crossing import CASES, FAR, QUARTER, TEXT, WHOLE, close, plainly, with_rows
from tiny import IMAGE, Case, built, tiny
from tiny.crossing import ROOM, SIDE, TILE, tiled
from torch import Tensor

import gazepatch
from gazepatch.config import GazeConfig
from gazepatch.context import initial_context_tokens
from gazepatch.errors import UnsupportedModelError
from gazepatch.layout import Span
from gazepatch.patch import patched, stats
from gazepatch.registry import adapter_for
from gazepatch.verification import generate_logits, verify

every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture
def case() -> Case:
    return built("mllama")


# ---- what is read


@every_case
@pytest.mark.parametrize("config", [QUARTER, FAR], ids=["alone", "periphery"])
def test_steps_read_what_the_definition_says(name: str, config: GazeConfig) -> None:
    case = CASES[name]()
    dense, tokens = generate_logits(case.model, case.inputs, 3)
    with plainly(case.model, config):
        expected, _ = generate_logits(case.model, case.inputs, 3, tokens)
    with patched(case.model, config):
        gazing, _ = generate_logits(case.model, case.inputs, 3, tokens)
    close(gazing, expected)
    assert torch.equal(gazing[:, 0], dense[:, 0])
    assert (gazing - dense).abs().max() > 1e-2


@every_case
def test_a_full_budget_is_dense(name: str) -> None:
    case = CASES[name]()
    dense, tokens = generate_logits(case.model, case.inputs, 4)
    with patched(case.model, WHOLE):
        whole, same = generate_logits(case.model, case.inputs, 4)
        assert stats(case.model).read_share == 1.0
    assert torch.equal(tokens, same)
    close(whole, dense)


@torch.no_grad()
@every_case
@pytest.mark.parametrize(("config", "cached"), [(QUARTER, True), (FAR, False)], ids=["cached", "uncached-periphery"])
def test_prompts_that_gaze(name: str, config: GazeConfig, cached: bool) -> None:
    case = CASES[name]()
    with plainly(case.model, config, prompts=True):
        expected = case.model(**case.inputs, use_cache=cached).logits
    with patched(case.model, config, prefill="gaze"):
        gazing = case.model(**case.inputs, use_cache=cached).logits
    kept = case.inputs["attention_mask"].bool()
    close(gazing[kept], expected[kept])
    assert (gazing - case.model(**case.inputs).logits)[kept].abs().max() > 1e-2


@torch.no_grad()
def test_without_a_mask_everything_is_seen(case: Case) -> None:
    inputs = {name: value for name, value in case.inputs.items() if name != "cross_attention_mask"}
    with plainly(case.model, QUARTER, prompts=True):
        expected = case.model(**inputs).logits
    with patched(case.model, QUARTER, prefill="gaze"):
        close(case.model(**inputs).logits, expected)
        generate_logits(case.model, inputs, 1)
        assert stats(case.model).visual_entries == 2 * 2 * 2 * ROOM * SIDE * SIDE  # layers, key heads, images


def test_a_prompt_of_one_token_is_a_prompt() -> None:
    case = with_rows([tiled(2, 2)])
    ids = torch.tensor([[IMAGE]])
    inputs = {**case.inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["cross_attention_mask"] = case.inputs["cross_attention_mask"][:, -1:]
    dense, tokens = generate_logits(case.model, inputs, 2)
    with plainly(case.model, QUARTER, prompts=False), torch.no_grad():
        assert not torch.equal(case.model(**inputs).logits[:, -1], dense[:, 0])  # plain gaze goes by the length alone
    with patched(case.model, QUARTER):
        gazing, _ = generate_logits(case.model, inputs, 2, tokens)
        assert stats(case.model).steps == 2
    assert torch.equal(gazing[:, 0], dense[:, 0])


def test_features_come_tile_by_tile_and_row_by_row() -> None:
    case = with_rows([tiled(6, 4)])
    tower, cells = case.model.model.vision_model, [(t, y, x) for t in range(4) for y in range(6) for x in range(6)]
    inputs = {name: case.inputs[name] for name in ("aspect_ratio_ids", "aspect_ratio_mask")}

    @torch.no_grad()
    def keys(picture: Tensor) -> Tensor:
        return tower(pixel_values=picture, **inputs).last_hidden_state.flatten(0, 3)

    picture, hits = case.inputs["pixel_values"], 0
    for tile, y, x in cells:
        changed = picture.clone()
        changed[0, 0, tile, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] *= -1
        moved = int((keys(changed) - keys(picture)).norm(dim=-1).argmax())
        hits += moved == tile * TILE + 1 + y * SIDE + x
    assert hits / len(cells) > 0.4


# ---- what is said of it


def test_layers_that_gaze_and_reasons(case: Case) -> None:
    report = gazepatch.inspect(case.model, case.inputs)
    assert report.gaze_layers == [1, 3]
    assert report.reasons == dict.fromkeys((0, 2), "self-attention layer: its keys are text")
    assert report.spans == case.spans
    with patched(case.model, QUARTER, dense_layers=(1,)):
        generate_logits(case.model, case.inputs, 2)
        assert list(stats(case.model).layers) == [3]
    with pytest.raises(UnsupportedModelError, match=r"none of the 4 layers.*its keys are text"):
        gazepatch.apply(case.model, QUARTER, dense_layers=(1, 3))


def test_spans_of_a_row_without_an_image() -> None:
    case = with_rows([], [tiled(2, 2)])
    assert [(span.row, span.start, span.tile) for span in gazepatch.inspect(case.model, case.inputs).spans] == [
        (1, 1, 0),
        (1, 1 + TILE, 1),
    ]
    adapter = adapter_for("mllama")
    assert adapter.cross_spans(case.model.config, 3) == [Span(0, 0, 3, None, 0)]
    assert adapter.locate(case.model.config, [[1, 2]], {}) == []


def test_counts_by_hand() -> None:
    """Two images of three and two tiles, of which an answer sees the last: 2 x 36 keys, 8 regions, 2 of them read."""
    case = CASES["the last of two images"]()
    with patched(case.model, QUARTER):
        generate_logits(case.model, case.inputs, 5)
        counted = stats(case.model)
    assert counted.steps == 5
    for layer in (1, 3):
        assert counted.layers[layer].visual_entries == 5 * 2 * 72  # steps, key heads
        assert counted.layers[layer].read_entries == 5 * 2 * 2 * 9
    assert counted.read_share == 0.25 and counted.context_entries == 0


def test_a_row_that_sees_nothing_sees_everything_as_in_transformers() -> None:
    case = CASES["a row without an image"]()
    with patched(case.model, QUARTER), gazepatch.trace(case.model) as trace:
        generate_logits(case.model, case.inputs, 1)
        counted = stats(case.model).layers[1]
    assert counted.visual_entries == 2 * (ROOM * 36 + 2 * 36) and counted.read_entries == 2 * (4 + 2) * 9
    assert [len(regions) for regions in trace.regions] == [4 * ROOM, 4 * 2]


def test_few_visible_keys_are_read_whole() -> None:
    case = CASES["the last of two images"]()
    dense, tokens = generate_logits(case.model, case.inputs, 3)
    most = ROOM * 2 * SIDE * SIDE  # seen by the words before the images, whose mask is lifted
    for prefill, least in (("dense", 73), ("gaze", most + 1)):
        with patched(case.model, QUARTER, min_visual_tokens=least, prefill=prefill):
            close(generate_logits(case.model, case.inputs, 3, tokens)[0][:, 1:], dense[:, 1:])
            assert stats(case.model).read_share == 1.0
    with patched(case.model, QUARTER, min_visual_tokens=72):
        generate_logits(case.model, case.inputs, 3)
        assert stats(case.model).read_share == 0.25


def test_a_trace_numbers_the_regions_that_are_seen() -> None:
    case = CASES["the last of two images"]()
    with patched(case.model, QUARTER), gazepatch.trace(case.model) as trace:
        generate_logits(case.model, case.inputs, 2)
    assert [(span.media, span.tile) for span in trace.spans] == [(1, 0), (1, 1)]
    assert [region.number for region in trace.regions[0]] == list(range(4 * ROOM, 4 * ROOM + 8))
    for step in trace.steps:
        for (read,) in step.values():
            assert read is not None and [len(numbers) for numbers in read] == [2, 2]
            assert all(4 * ROOM <= number < 4 * ROOM + 8 for numbers in read for number in numbers)
    assert trace.read_share(0) == 0.25
    assert trace.to_dict()["spans"][0]["start"] == ROOM * TILE + 1


def test_context_tokens_have_no_place(case: Case) -> None:
    with pytest.raises(UnsupportedModelError, match=r"no token of the sequence stands there.*context_tokens=0"):
        gazepatch.apply(case.model, QUARTER, context_tokens=initial_context_tokens(case.model, 2))


# ---- all the rest


def test_verify_by_kind_of_attention() -> None:
    case = tiny("mllama")
    for kind, attention in ((torch.float32, "sdpa"), (torch.float32, "eager"), (torch.bfloat16, "sdpa")):
        case.model.to(kind).set_attn_implementation(attention)
        inputs = {**case.inputs, "pixel_values": case.inputs["pixel_values"].to(kind)}
        with patched(case.model, FAR):
            report = verify(case.model, inputs)
        assert report.passed, report


@torch.no_grad()
def test_in_float16_a_hidden_tile_is_hidden() -> None:
    """Whose least number is not as little as that of other types."""
    case = tiny("mllama")
    case.model.half()
    changed = {**case.inputs, "pixel_values": case.inputs["pixel_values"].half()}
    keys = case.model.model.vision_model(**{k: changed[k] for k in changed if k.startswith(("pixel", "aspect"))})
    states = case.model.model.multi_modal_projector(keys.last_hidden_state).flatten(0, 2)
    texts = {name: case.inputs[name] for name in TEXT}
    texts["cross_attention_mask"] = case.inputs["cross_attention_mask"][:, -1:].expand(-1, 18, -1, -1)
    other = states.clone()
    other.view(2, ROOM, TILE, -1)[0, 2:] = other.view(2, ROOM, TILE, -1)[1, 0]  # tiles that nobody sees
    for prefill in ("dense", "gaze"):
        with patched(case.model, FAR, prefill=prefill):
            found = [case.model(**texts, cross_attention_states=each).logits[0, -1] for each in (states, other)]
        assert torch.equal(*found)


def test_gradient_checkpointing() -> None:
    case = tiny("mllama")
    case.model.train()

    def gradients() -> list[Tensor]:
        case.model.zero_grad()
        case.model(**case.inputs, labels=case.inputs["input_ids"]).loss.backward()
        return [p.grad.clone() for p in case.model.parameters() if p.grad is not None]

    dense = gradients()
    with patched(case.model, QUARTER, prefill="gaze"):
        plain = gradients()
        case.model.gradient_checkpointing_enable()
        again = gradients()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, again, strict=True))
    assert not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, dense, strict=True))
