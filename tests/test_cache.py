"""The gaze cache: several turns, other people's caches, beams, cropping, growth."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from stepping import assert_statistics_of_copies
from tiny import Case, batch, tiny
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

from gazepatch.caches.layer import GazeLayer
from gazepatch.config import GazeConfig
from gazepatch.errors import CacheError
from gazepatch.patch import apply, patched, restore, set_budget, stats
from gazepatch.running import attention, prompt
from gazepatch.running.call import Call

WHOLE = GazeConfig(region=(3, 3, 1), window=(1, 3, 1), budget=1.0, periphery=False, min_visual_tokens=0)
QUARTER = dataclasses.replace(WHOLE, budget=0.25)


@pytest.fixture(params=["llava", "llava_latent"])
def case(request: pytest.FixtureRequest) -> Case:
    return tiny(request.param)


def generate(case: Case, steps: int = 6, **inputs: object) -> Tensor:
    given = {**case.inputs, **inputs}
    return case.model.generate(**given, max_new_tokens=steps, min_new_tokens=steps)


def two_turns(case: Case, cache: DynamicCache, second: dict[str, Tensor]) -> Tensor:
    """Greedy tokens of a prompt, then of a second one on the same cache."""
    first = generate(case, past_key_values=cache)
    ids = torch.cat([first, second["input_ids"]], 1)
    images = {name: value for name, value in second.items() if name != "input_ids"}
    return case.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=6, **images
    )


TEXT = {"input_ids": torch.tensor([[11, 12, 13, 14, 15]])}


def image_turn(case: Case) -> dict[str, Tensor]:
    """Another image, of the kind the case's prompt has, with text around it."""
    first = case.spans[0]
    image = case.inputs["input_ids"][:, first.start : first.stop]
    text = torch.tensor([[21, 22, 23]])
    return {
        "input_ids": torch.cat([text, image, text], 1),
        "pixel_values": torch.randn_like(case.inputs["pixel_values"][:1]),
    }


@pytest.mark.parametrize("prefill", ["dense", "gaze"])
@pytest.mark.parametrize("turn", ["text", "image"])
def test_a_second_turn_at_full_budget_is_dense(case: Case, turn: str, prefill: str) -> None:
    second = TEXT if turn == "text" else image_turn(case)
    dense = two_turns(case, DynamicCache(), second)
    with patched(case.model, WHOLE, prefill=prefill):
        assert torch.equal(two_turns(case, DynamicCache(), second), dense)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_a_sequence_that_gets_enough_visual_tokens_later_is_sorted_then(case: Case, settings: dict) -> None:
    second, enough = image_turn(case), sum(span.tokens for span in case.spans) + 1
    dense = two_turns(case, DynamicCache(), second)
    with patched(case.model, WHOLE, min_visual_tokens=enough):
        cache = DynamicCache()
        generate(case, past_key_values=cache, **settings)
        assert cache.gaze.regions is None and stats(case.model).read_share == 1.0
        cache = DynamicCache()
        assert torch.equal(two_turns(case, cache, second), dense)
        assert cache.gaze.regions.counts == (9 * 3,)
    with patched(case.model, QUARTER, min_visual_tokens=enough):
        two_turns(case, DynamicCache(), second)
        assert stats(case.model).read_share < 0.5


@pytest.mark.parametrize("prefill", ["dense", "gaze"])
def test_an_image_behind_a_first_turn_of_text_is_dense_at_full_budget(case: Case, prefill: str) -> None:
    text = dataclasses.replace(case, inputs={"input_ids": TEXT["input_ids"]})
    second = image_turn(case)
    dense = two_turns(text, DynamicCache(), second)
    with patched(case.model, WHOLE, prefill=prefill):
        assert torch.equal(two_turns(text, DynamicCache(), second), dense)


def test_an_image_of_a_later_turn_gazes_too(case: Case) -> None:
    with patched(case.model, QUARTER):
        two_turns(case, DynamicCache(), image_turn(case))
        per_step = stats(case.model).visual_entries / stats(case.model).steps
        generate(case)
        before = stats(case.model).visual_entries / stats(case.model).steps
    assert per_step > before


@pytest.mark.parametrize("with_configuration", [True, False], ids=["layers", "no-layers"])
def test_the_cache_given_is_the_one_filled(case: Case, with_configuration: bool) -> None:
    cache = DynamicCache(config=case.model.config) if with_configuration else DynamicCache()
    with patched(case.model, QUARTER):
        generate(case, past_key_values=cache)
    assert cache.get_seq_length() == case.inputs["input_ids"].shape[1] + 5
    assert all(isinstance(layer, GazeLayer) for layer in cache.layers)


def test_keys_and_values_are_in_the_order_of_the_sequence(case: Case) -> None:
    dense, gazing = DynamicCache(), DynamicCache()
    generate(case, past_key_values=dense)
    with patched(case.model, WHOLE):
        generate(case, past_key_values=gazing)
    for one, other in zip(dense.layers, gazing.layers, strict=True):
        assert torch.allclose(one.keys, other.keys, atol=1e-5)
        assert torch.allclose(one.values, other.values, atol=1e-5)


def test_a_forward_without_a_cache_makes_one_that_goes_on(case: Case) -> None:
    with torch.no_grad(), patched(case.model, QUARTER):
        out = case.model(**case.inputs, use_cache=True)
        assert all(isinstance(layer, GazeLayer) for layer in out.past_key_values.layers)
        case.model(input_ids=torch.tensor([[5]]), past_key_values=out.past_key_values)
        assert stats(case.model).steps == 1


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("rows", [1, 2])
def test_beam_search_at_full_budget_is_dense(case: Case, settings: dict, rows: int) -> None:
    given = batch(case) if rows == 2 else case
    dense = given.model.generate(**given.inputs, max_new_tokens=8, **settings)
    with patched(given.model, WHOLE):
        assert torch.equal(given.model.generate(**given.inputs, max_new_tokens=8, **settings), dense)


def test_several_answers_at_full_budget_are_dense(case: Case) -> None:
    settings = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 6}
    torch.manual_seed(0)
    dense = case.model.generate(**case.inputs, **settings)
    with patched(case.model, WHOLE):
        torch.manual_seed(0)
        assert torch.equal(case.model.generate(**case.inputs, **settings), dense)


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
        once = generate(case, past_key_values=cache)
        length = cache.get_seq_length()
        cache.crop(-3)
        assert cache.get_seq_length() == length - 3
        ids = once[:, : length - 3 + 1]
        again = case.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=3
        )
        assert torch.equal(again, once[:, : ids.shape[1] + 3][:, : again.shape[1]])
        with pytest.raises(CacheError, match="only text behind the last image"):
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
        with pytest.raises(CacheError, match="only text behind the last image"):
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


@torch.no_grad()
def test_statistics_are_of_the_cache_that_was_used_last(case: Case) -> None:
    assert_statistics_of_copies(case, DynamicCache())


def test_a_copy_goes_its_own_way(case: Case) -> None:
    cache = DynamicCache()
    with torch.no_grad(), patched(case.model, QUARTER):
        case.model(**case.inputs, past_key_values=cache)
        twin = copy.deepcopy(cache)
        logits = [case.model(input_ids=torch.tensor([[5]]), past_key_values=c).logits for c in (cache, twin)]
        assert torch.equal(*logits)
        case.model(input_ids=torch.tensor([[5]]), past_key_values=cache)
        assert cache.get_seq_length() == twin.get_seq_length() + 1


def test_reset_makes_a_cache_that_starts_again(case: Case) -> None:
    cache = DynamicCache()
    with patched(case.model, QUARTER):
        first = generate(case, past_key_values=cache)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(generate(case, past_key_values=cache), first)


@torch.no_grad()
def test_a_filled_cache_keeps_its_budget(case: Case) -> None:
    with patched(case.model, QUARTER, prefill="gaze"):
        caches = DynamicCache(), DynamicCache()
        for cache in caches:
            case.model(**case.inputs, past_key_values=cache)
        expected = case.model(**TEXT, past_key_values=caches[0]).logits
        set_budget(case.model, 1.0)
        assert torch.equal(case.model(**TEXT, past_key_values=caches[1]).logits, expected)


@pytest.mark.parametrize("name", ["llava", "mllama"])
@torch.no_grad()
def test_a_cache_that_was_reset_takes_a_new_budget(name: str) -> None:
    case = tiny(name)
    cache = DynamicCache(config=case.model.config.get_text_config())
    with patched(case.model, QUARTER):
        for budget in (0.25, 1.0):
            set_budget(case.model, budget)
            cache.reset()
            generate(case, past_key_values=cache)
            assert stats(case.model).read_share == pytest.approx(budget, abs=0.05)


def test_a_cache_filled_while_patched_belongs_to_the_patch(case: Case) -> None:
    cache = DynamicCache()
    token = {"input_ids": torch.tensor([[5]]), "past_key_values": cache}
    with torch.no_grad():
        with patched(case.model, QUARTER):
            case.model(**case.inputs, past_key_values=cache)
        with pytest.raises(CacheError, match=r"after gazepatch\.restore"):
            case.model(**token)
        with patched(case.model, QUARTER), pytest.raises(CacheError, match="start with a new cache"):
            case.model(**token)
        other = tiny("llava").model
        with pytest.raises(CacheError, match="another model"):
            other(**token)
        with patched(other, QUARTER), pytest.raises(CacheError, match="another model"):
            other(**token)


def test_a_cache_filled_while_unpatched_is_refused(case: Case) -> None:
    cache = DynamicCache()
    with torch.no_grad():
        case.model(**case.inputs, past_key_values=cache)
        with patched(case.model, QUARTER), pytest.raises(CacheError, match="patch the model first"):
            case.model(input_ids=torch.tensor([[5]]), past_key_values=cache)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_offloaded_caches_are_refused(case: Case, kind: Any) -> None:
    cache = kind(config=case.model.config, **({"max_cache_len": 300} if kind is StaticCache else {}))
    cache.offloading = True
    with patched(case.model, QUARTER), pytest.raises(CacheError, match=r"an offloaded cache: .*='dynamic'"):
        case.model(**case.inputs, past_key_values=cache)


def test_other_kinds_of_cache_are_refused(case: Case) -> None:
    class OtherCache(Cache):
        pass

    with patched(case.model, QUARTER), pytest.raises(CacheError, match=r"got a OtherCache: .*='dynamic'"):
        case.model(**case.inputs, past_key_values=OtherCache(layers=[]))


def test_a_cache_whose_forward_failed_is_refused(case: Case) -> None:
    cache = DynamicCache()

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    with torch.no_grad(), patched(case.model, QUARTER):
        case.model(**case.inputs, past_key_values=cache)
        hook = case.model.model.language_model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            case.model(input_ids=torch.tensor([[5]]), past_key_values=cache)
        hook.remove()
        with pytest.raises(CacheError, match="failed half-way"):
            case.model(input_ids=torch.tensor([[5]]), past_key_values=cache)


def test_restore_then_apply_needs_a_new_cache_only(case: Case) -> None:
    apply(case.model, QUARTER)
    first = generate(case)
    restore(case.model)
    apply(case.model, QUARTER)
    assert torch.equal(generate(case), first)


def test_an_image_behind_cropped_text_of_the_same_length(case: Case) -> None:
    """The sequence is as long as before, but in another order: nothing may be remembered from before the crop."""
    second = image_turn(case)
    generated = second["input_ids"].shape[1]

    def run(cache: DynamicCache) -> Tensor:
        first = generate(case, steps=generated + 1, past_key_values=cache)
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


def test_a_mask_of_padding_only_is_causal_for_queries_that_gaze(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """As flash attention gets it: two dimensions, and the kernel is causal by itself."""
    pair, calls = batch(case), []

    def with_padding_mask(call: Call, *arguments: Any) -> Tensor:
        calls.append(call)
        return prompt.gaze(dataclasses.replace(call, mask=pair.inputs["attention_mask"]), *arguments)

    with patched(pair.model, QUARTER, prefill="gaze"), torch.no_grad():
        expected = pair.model(**pair.inputs, use_cache=False).logits
        monkeypatch.setattr(attention, "gaze", with_padding_mask)
        actual = pair.model(**pair.inputs, use_cache=False).logits
    kept = pair.inputs["attention_mask"].bool()
    assert calls and torch.allclose(actual[kept], expected[kept], atol=1e-5)
