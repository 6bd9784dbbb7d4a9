"""Tokens that a cache forgets again: guesses that were wrong, and turns that are asked anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stepping import QUARTER, SETTINGS, WHOLE, image_turn, said, static
from tiny import Case, batch, tiny
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

from gazepatch.errors import CacheError
from gazepatch.patch import patched, stats


@pytest.fixture(params=["llava", "llava_latent"])
def case(request: pytest.FixtureRequest) -> Case:
    return tiny(request.param)


def test_prompt_lookup_crops_and_stays_dense_at_full_budget(case: Case) -> None:
    settings = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 12}
    dense = case.model.generate(**case.inputs, **settings)
    with patched(case.model, WHOLE):
        assert torch.equal(case.model.generate(**case.inputs, **settings), dense)


@pytest.mark.parametrize("name", ["gemma3", "gemma3_short"])
def test_prompt_lookup_rolls_sliding_windows_among_context_tokens_back(name: str) -> None:
    case = tiny(name)
    with patched(case.model, QUARTER, context_tokens=torch.randn(3, 64)):
        greedy = case.model.generate(**case.inputs, max_new_tokens=30)
        found = case.model.generate(**case.inputs, max_new_tokens=30, prompt_lookup_num_tokens=3)
    # A forward of several tokens reads densely, so the answers may part, but not before such a forward.
    assert found.shape == greedy.shape
    with patched(case.model, WHOLE, context_tokens=torch.randn(3, 64)):
        greedy = case.model.generate(**case.inputs, max_new_tokens=30)
        assert torch.equal(case.model.generate(**case.inputs, max_new_tokens=30, prompt_lookup_num_tokens=3), greedy)


def test_crop_forgets_text_but_no_image(case: Case) -> None:
    cache = DynamicCache()
    with patched(case.model, QUARTER):
        once = said(case, past_key_values=cache)
        length = cache.get_seq_length()
        cache.crop(-3)
        assert cache.get_seq_length() == length - 3
        ids = once[:, : length - 3 + 1]
        again = case.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=3
        )
        assert torch.equal(again, once[:, : ids.shape[1] + 3][:, : again.shape[1]])
        with pytest.raises(CacheError, match="only text after the last image"):
            cache.crop(-(cache.get_seq_length() - case.spans[-1].start))


@torch.no_grad()
def test_a_crop_by_a_number_in_a_tensor(case: Case) -> None:
    def run(*crops: Any) -> Tensor:
        cache = DynamicCache()
        case.model(**case.inputs, past_key_values=cache)
        for crop in crops:
            cache.crop(crop)
            ids = torch.tensor([[5, 6]])
            logits = case.model(input_ids=ids, past_key_values=cache).logits
        assert type(cache.get_seq_length()) is int
        return logits

    with patched(case.model, QUARTER):
        assert torch.equal(run(torch.tensor(-1), -1, torch.tensor(-2), -1), run(-1, -1, -2, -1))


@pytest.mark.parametrize(
    ("name", "settings", "broken"),
    [("llava", {"dense_layers": (0,)}, False), ("gemma3", {}, True)],
    ids=["a layer of ours before", "a sliding window before"],
)
@torch.no_grad()
def test_a_refused_crop_leaves_no_layer_shorter_than_another(name: str, settings: dict, broken: bool) -> None:
    case = tiny(name)
    with patched(case.model, QUARTER, **settings):
        cache, untouched = (DynamicCache(config=case.model.config.get_text_config()) for _ in range(2))
        for each in (cache, untouched):
            each.activate_past_recording()
            case.model(**case.inputs, past_key_values=each)
        with pytest.raises(CacheError, match="only text after the last image"):
            cache.crop(case.spans[-1].start - cache.get_seq_length())
        steps = [{"input_ids": torch.tensor([[5]]), "past_key_values": each} for each in (cache, untouched)]
        if broken:  # transformers' own layer has forgotten the image
            with pytest.raises(CacheError, match="crop of this cache failed half-way"):
                case.model(**steps[0])
        else:
            assert torch.equal(case.model(**steps[0]).logits, case.model(**steps[1]).logits)


@torch.no_grad()
def test_guesses_of_image_tokens_are_words(case: Case) -> None:
    """Prompt lookup guesses what followed in the prompt, which may be an image: its tokens come without one."""
    guess = torch.cat([torch.tensor([[11, 12]]), case.inputs["input_ids"][:, case.spans[0].start :][:, :2]], 1)

    def run() -> list[Tensor]:
        cache = DynamicCache(config=case.model.config)
        case.model(**case.inputs, past_key_values=cache)
        whole = case.model(input_ids=guess, past_key_values=cache).logits
        cache.crop(-3)
        return [whole, case.model(input_ids=torch.tensor([[7]]), past_key_values=cache).logits]

    dense = run()
    with patched(case.model, WHOLE):
        for found, expected in zip(run(), dense, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_image_after_cropped_text_of_the_same_length(case: Case) -> None:
    """The sequence is as long as before, but in another order: nothing may be remembered from before the crop."""
    second = image_turn(case)
    generated = second["input_ids"].shape[1]

    def run(cache: DynamicCache) -> Tensor:
        first = said(case, steps=generated + 1, past_key_values=cache)
        cache.crop(-generated)
        ids = torch.cat([first[:, : cache.get_seq_length()], second["input_ids"]], 1)
        images = {"pixel_values": second["pixel_values"], "attention_mask": torch.ones_like(ids)}
        return case.model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=6, **images)

    dense = run(DynamicCache())
    with patched(case.model, WHOLE):
        cache = DynamicCache()
        assert torch.equal(run(cache), dense)
        assert all(layer.keys is not None for layer in cache.layers)


def test_a_cropped_image_does_not_count_any_more(case: Case) -> None:
    cache, tokens = DynamicCache(), sum(span.tokens for span in case.spans)
    with torch.no_grad(), patched(case.model, WHOLE, min_visual_tokens=2 * tokens):
        case.model(**case.inputs, past_key_values=cache)
        cache.crop(case.spans[0].start - cache.get_seq_length())
        assert cache.gaze.spans == [] and cache.get_seq_length() == case.spans[0].start


# ---- static caches

croppable = pytest.mark.skipif(
    not getattr(StaticLayer, "is_croppable", False), reason="static caches cannot be cropped before transformers 5.24"
)


@croppable
@pytest.mark.parametrize(("name", "tokens"), [("llava", 0), ("qwen2_vl", 3)], ids=["", "context tokens"])
def test_prompt_lookup_on_a_static_cache(name: str, tokens: int) -> None:
    case = tiny(name)
    context = torch.randn(tokens, 64) if tokens else None
    settings = {"prompt_lookup_num_tokens": 3, "steps": 30}
    # The cache that `generate` makes for itself has no room for the last guesses, patched or not (transformers 5.24).
    dense = said(case, past_key_values=static(case), **settings)
    for of_settings, config in SETTINGS.items():
        with patched(case.model, config, context_tokens=context):
            found = said(case, past_key_values=static(case), **settings)
            assert torch.equal(found, said(case, **settings)), of_settings
            if config is WHOLE and not tokens:
                assert torch.equal(found, dense)


@croppable
@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2])
def test_a_static_cache_goes_on_where_it_was_cropped(rows: int) -> None:
    case = tiny("llava") if rows == 1 else batch(tiny("llava"))

    def run(cache: Any, *turns: list[int] | int) -> list[Tensor]:
        case.model(**case.inputs, past_key_values=cache)
        logits = []
        for turn in turns:
            if isinstance(turn, int):
                cache.crop(-turn)
            else:
                logits.append(case.model(input_ids=torch.tensor([turn] * rows), past_key_values=cache).logits)
        return [*logits, torch.tensor([float(cache.get_seq_length())]), torch.tensor(stats(case.model).read_entries)]

    turns = ([5], [6], [7], 2, [8], [9, 10, 11], [12], 4, [13], [14])
    for config in SETTINGS.values():
        with patched(case.model, config):
            for found, expected in zip(run(static(case), *turns), run(DynamicCache(), *turns), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_static_caches_can_be_cropped_where_those_of_transformers_can() -> None:
    case = tiny("llava")
    with patched(case.model, QUARTER):
        cache = static(case)
        case.model(**case.inputs, past_key_values=cache)
        assert all(layer.is_croppable == getattr(StaticLayer, "is_croppable", False) for layer in cache.layers)
        if not cache.layers[0].is_croppable:
            with pytest.raises(CacheError, match="cannot be cropped"):
                cache.crop(-1)


@croppable
@torch.no_grad()
def test_what_a_cropped_static_cache_refuses() -> None:
    case = tiny("llava")
    with patched(case.model, QUARTER):
        cache: StaticCache = static(case)
        case.model(**case.inputs, past_key_values=cache)
        with pytest.raises(CacheError, match="only text after the last image"):
            cache.crop(case.spans[-1].start - int(cache.get_seq_length()))
        with pytest.raises(CacheError, match="expected minus the number of tokens"):
            cache.crop(3)
        case.model(input_ids=torch.tensor([[5]]), past_key_values=cache)
