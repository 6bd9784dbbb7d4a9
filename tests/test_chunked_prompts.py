"""Prompts that come in pieces (`prefill_chunk_size`): cut inside images, they end up as if they had come whole."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from stepping import QUARTER, SETTINGS, WHOLE, generate
from tiny import CORE, Case, batch, tiny
from torch import Tensor
from transformers import DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from gazepatch import CacheError, GazeConfig
from gazepatch.patch import patched, stats, trace

pytestmark = pytest.mark.skipif(
    not hasattr(GenerationMixin, "_supports_mm_encoder_outputs"),
    reason="this transformers loses the images of a prompt that it cuts",
)

#: Families of `CORE` that transformers itself reads alike in pieces: no token of an image sees one after it.
CUT = [name for name in CORE if name not in ("gemma3", "granite4_vision", "mllama", "paligemma")]


def said(case: Case, **settings: Any) -> tuple[Tensor, Any, Any]:
    """Logits, where images were found, and what was read of them."""
    with trace(case.model) as seen:
        logits = torch.stack(generate(case, **settings).logits, 1)
    return logits, seen.spans, stats(case.model)


def equal_in_pieces(case: Case, size: int, config: GazeConfig, **settings: Any) -> None:
    with patched(case.model, config):
        whole, spans, reads = said(case, **settings)
        pieces, *found = said(case, prefill_chunk_size=size, **settings)
    assert spans
    assert found == [spans, reads]
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CUT)
def test_images_are_found_whole(name: str) -> None:
    case = tiny(name)
    dense = torch.stack(generate(case, prefill_chunk_size=17).logits, 1)
    with patched(case.model, WHOLE):
        assert torch.allclose(said(case, prefill_chunk_size=17)[0], dense, atol=1e-4)
    equal_in_pieces(case, 17, QUARTER)


@pytest.mark.parametrize("name", ["kimi_k25", "llava_onevision", "qwen2_5_vl"])
def test_videos_are_found_whole(name: str) -> None:
    equal_in_pieces(tiny(name, video=True), 17, QUARTER)


@pytest.mark.parametrize("settings", sorted(SETTINGS.keys() - {"gaze prefill"}))
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("size", [9, 17, 40])
def test_rows_of_different_images(cache: str, settings: str, size: int) -> None:
    equal_in_pieces(batch(tiny("qwen2_5_vl")), size, SETTINGS[settings], cache_implementation=cache)


@pytest.mark.parametrize("size", [9, 17, 40])
def test_text_after_the_last_image_gazes(size: int) -> None:
    case = tiny("qwen2_5_vl")
    one = dataclasses.replace(case, inputs=of_image(case, 0, case.spans[1].start - 1))
    equal_in_pieces(one, size, SETTINGS["gaze prefill"])


@pytest.mark.parametrize("size", [17, 32, 80])
def test_pieces_of_beams(size: int) -> None:
    equal_in_pieces(batch(tiny("llava_next")), size, QUARTER, num_beams=3)


@pytest.mark.parametrize("size", [3, 36])
def test_pieces_of_beams_with_images_that_are_alike(size: int) -> None:
    # After the first of two images, two beams have as many tokens as there are features.
    equal_in_pieces(tiny("llava"), size, QUARTER, num_beams=2)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("size", [1, 11])
def test_pieces_of_one_token(size: int, cache: str) -> None:
    case = tiny("llava")
    assert case.inputs["input_ids"].shape[1] % size == (1 if size > 1 else 0)
    equal_in_pieces(case, size, QUARTER, cache_implementation=cache)


@torch.no_grad()
def test_a_later_turn_in_pieces() -> None:
    case = tiny("qwen2_5_vl")
    first, second = (span.stop + 1 for span in case.spans)
    found = []
    with patched(case.model, QUARTER):
        for size in (None, 17):
            cache = DynamicCache()
            one = dataclasses.replace(case, inputs=of_image(case, 0, first))
            generate(one, 1, past_key_values=cache)
            both = {**of_image(case, 1, second), "input_ids": case.inputs["input_ids"]}
            found.append(said(dataclasses.replace(case, inputs=both), past_key_values=cache, prefill_chunk_size=size))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-4)
    assert found[1][1:] == found[0][1:]
    assert len(found[0][1]) == 2


def of_image(case: Case, number: int, tokens: int) -> dict[str, Tensor]:
    """The first tokens of a prompt, and the pixels of one of its images."""
    grids = case.inputs["image_grid_thw"]
    patches = grids.prod(1).tolist()
    return {
        "input_ids": case.inputs["input_ids"][:, :tokens],
        "pixel_values": case.inputs["pixel_values"].split(patches)[number],
        "image_grid_thw": grids[number : number + 1],
    }


@torch.no_grad()
def test_an_image_that_is_still_to_come_is_not_cropped() -> None:
    case, cache = tiny("llava"), DynamicCache()
    ids, (image, _) = case.inputs["input_ids"], case.spans
    with patched(case.model, QUARTER):
        features = case.model.get_image_features(case.inputs["pixel_values"])
        half = BaseModelOutputWithPooling(pooler_output=[features.pooler_output[0][:32]])
        case.model(ids[:, : image.start + 32], mm_encoder_outputs={"image": half}, past_key_values=cache)
        assert cache.gaze.regions is None
        with pytest.raises(CacheError, match="only text after the last image can be forgotten, 0 tokens here"):
            cache.crop(-1)


@torch.no_grad()
def test_images_that_never_come_keep_nobody_waiting() -> None:
    case, cache = tiny("llava"), DynamicCache()
    ids, (image, _) = case.inputs["input_ids"], case.spans
    with patched(case.model, QUARTER):
        features = case.model.get_image_features(case.inputs["pixel_values"])
        one = BaseModelOutputWithPooling(pooler_output=list(features.pooler_output[:1]))
        case.model(ids[:, : image.stop + 2], mm_encoder_outputs={"image": one}, past_key_values=cache)
        for step in range(3):
            case.model(torch.tensor([[5]]), past_key_values=cache)
            assert cache.gaze.spans == case.spans[:1]
            assert stats(case.model).steps == step
