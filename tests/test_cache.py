"""The gaze cache: several turns, other people's caches, beams, cropping, growth."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from stepping import QUARTER, WHOLE, assert_statistics_of_copies, image_turn, said
from tiny import Case, batch, tiny
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

from gazepatch.caches.layer import GazeLayer
from gazepatch.errors import CacheError
from gazepatch.patch import apply, patched, restore, set_budget, stats
from gazepatch.running import attention, prompt
from gazepatch.running.call import Call


@pytest.fixture(params=["llava", "llava_latent"])
def case(request: pytest.FixtureRequest) -> Case:
    return tiny(request.param)


def two_turns(case: Case, cache: DynamicCache, second: dict[str, Tensor]) -> Tensor:
    """Greedy tokens of a prompt, then of a second one on the same cache."""
    first = said(case, past_key_values=cache)
    ids = torch.cat([first, second["input_ids"]], 1)
    images = {name: value for name, value in second.items() if name != "input_ids"}
    return case.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=6, **images
    )


TEXT = {"input_ids": torch.tensor([[11, 12, 13, 14, 15]])}


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
        said(case, past_key_values=cache, **settings)
        assert cache.gaze.regions is None and stats(case.model).read_share == 1.0
        cache = DynamicCache()
        assert torch.equal(two_turns(case, cache, second), dense)
        assert cache.gaze.regions.counts == (9 * 3,)
    with patched(case.model, QUARTER, min_visual_tokens=enough):
        two_turns(case, DynamicCache(), second)
        assert stats(case.model).read_share < 0.5


@pytest.mark.parametrize("prefill", ["dense", "gaze"])
def test_an_image_after_a_first_turn_of_text_is_dense_at_full_budget(case: Case, prefill: str) -> None:
    text = dataclasses.replace(case, inputs={"input_ids": TEXT["input_ids"]})
    second = image_turn(case)
    dense = two_turns(text, DynamicCache(), second)
    with patched(case.model, WHOLE, prefill=prefill):
        assert torch.equal(two_turns(text, DynamicCache(), second), dense)


def test_an_image_of_a_later_turn_gazes_too(case: Case) -> None:
    with patched(case.model, QUARTER):
        two_turns(case, DynamicCache(), image_turn(case))
        per_step = stats(case.model).visual_entries / stats(case.model).steps
        said(case)
        before = stats(case.model).visual_entries / stats(case.model).steps
    assert per_step > before


def test_a_video_of_a_later_turn_is_found_where_its_features_are_made_as_those_of_images() -> None:
    case = tiny("perception_lm", video=True)
    first = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad(), patched(case.model, QUARTER):
        cache = DynamicCache()
        case.model(input_ids=first, past_key_values=cache)
        case.model(**case.inputs, past_key_values=cache)
    moved = [dataclasses.replace(span, start=span.start + 4, stop=span.stop + 4) for span in case.spans]
    assert case.spans and cache.gaze.spans == moved


@pytest.mark.parametrize("with_configuration", [True, False], ids=["layers", "no-layers"])
def test_the_cache_given_is_the_one_filled(case: Case, with_configuration: bool) -> None:
    cache = DynamicCache(config=case.model.config) if with_configuration else DynamicCache()
    with patched(case.model, QUARTER):
        said(case, past_key_values=cache)
    assert cache.get_seq_length() == case.inputs["input_ids"].shape[1] + 5
    assert all(isinstance(layer, GazeLayer) for layer in cache.layers)


def test_keys_and_values_are_in_the_order_of_the_sequence(case: Case) -> None:
    dense, gazing = DynamicCache(), DynamicCache()
    said(case, past_key_values=dense)
    with patched(case.model, WHOLE):
        said(case, past_key_values=gazing)
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


def test_it_cannot_be_saved(case: Case) -> None:
    with torch.no_grad(), patched(case.model, QUARTER):
        cache = DynamicCache()
        case.model(**case.inputs, past_key_values=cache)
        with pytest.raises(CacheError, match=r"keep a copy\.deepcopy of it, or fill another one"):
            pickle.dumps(cache)


def test_reset_makes_a_cache_that_starts_again(case: Case) -> None:
    cache = DynamicCache()
    with patched(case.model, QUARTER):
        first = said(case, past_key_values=cache)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(said(case, past_key_values=cache), first)


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
            said(case, past_key_values=cache)
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
    first = said(case)
    restore(case.model)
    apply(case.model, QUARTER)
    assert torch.equal(said(case), first)


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
