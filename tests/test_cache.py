"""The gaze cache: several turns, other people's caches, beams, cropping, growth."""

from __future__ import annotations

import copy
import dataclasses
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tiny import Case, batch, tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Cache, DynamicCache, StaticCache

from gazepatch.caches.hybrid import HybridLayer
from gazepatch.caches.layer import LEAST_ROOM, GazeLayer
from gazepatch.caches.state import GazeState
from gazepatch.config import GazeConfig
from gazepatch.errors import CacheError
from gazepatch.layout import Span
from gazepatch.patch import apply, patched, restore, stats
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


def filled_layer(tokens: int, span: Span) -> tuple[GazeState, GazeLayer, object]:
    owner = type("Owner", (), {})()
    state = GazeState(owner, QUARTER)
    layer = GazeLayer(state, gazes=True, leads=True)
    state.begin([span], 1, tokens)
    layer.update(torch.randn(1, 2, tokens, 8), torch.randn(1, 2, tokens, 8))
    state.finish(True)
    return state, layer, owner


def test_decode_steps_append_in_place_and_grow_rarely() -> None:
    state, layer, _owner = filled_layer(50, Span(0, 4, 40, (1, 6, 6), 0))
    stores = set()
    for step in range(3 * LEAST_ROOM):
        state.begin([], 1, 1)
        new = torch.full((1, 2, 1, 8), float(step))
        layer.update(new, -new)
        key, value = layer.entries()[:2]
        state.finish(True)
        stores.add(key.untyped_storage().data_ptr())
        assert key.shape[2] == 14 + step + 1
        assert torch.equal(key[:, :, -1:], new) and torch.equal(value[:, :, -1:], -new)
    assert len(stores) <= 4
    assert torch.equal(layer.logical()[0][:, :, 50:, 0], torch.arange(3 * LEAST_ROOM).expand(1, 2, -1).float())


def test_an_entry_that_nobody_attended_to_is_not_lost() -> None:
    state, layer, _owner = filled_layer(50, Span(0, 4, 40, (1, 6, 6), 0))
    for step in range(4):
        state.begin([], 1, 1)
        layer.update(torch.full((1, 2, 1, 8), float(step)), torch.full((1, 2, 1, 8), -float(step)))
        if step == 1:
            layer.batch_select_indices(torch.tensor([0]))
        if step == 2:
            assert torch.equal(layer.logical()[0][0, 0, 50:, 0], torch.arange(3.0))
        state.finish(True)
    late = layer.take_late()
    assert late is not None and layer.take_late() is None
    assert layer.keys[0, 0, 50:53, 0].tolist() == [0, 1, 2]
    late.write()  # by whoever took it
    assert layer.keys[0, 0, 50:, 0].tolist() == [0, 1, 2, 3] and layer.values[0, 1, -1, 7] == -3


def test_memory_is_close_to_that_of_the_entries() -> None:
    tokens = 64 * 64 + 100
    state, layer, _owner = filled_layer(tokens, Span(0, 50, 50 + 64 * 64, (1, 64, 64), 0))
    state.begin([], 1, 1)
    layer.update(torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8))
    assert layer.nbytes() <= 1.25 * 2 * (tokens + 1) * 2 * 8 * 4


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


class NothingSent(TorchDispatchMode):
    """Fails where numbers of the host are sent to the device, which it waits for."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operator(*args, **(kwargs or {}))
        assert operator is not torch.ops.aten._to_copy.default or args[0].device == made.device
        return made


def test_padding_is_sent_to_the_device_once() -> None:
    device, mask = torch.device("meta"), torch.ones(2, 1, 1, 100, dtype=torch.bool, device="meta")
    state = GazeState(torch.nn.Module(), QUARTER)
    state.begin([Span(0, 3, 43, (1, 5, 8), 0)], 2, 50)  # the second row has no image, so it has more other entries
    state.finish(True)
    for step, context in enumerate((nullcontext(), NothingSent(), NothingSent()), 1):
        with context:
            state.begin([], 2, 1)
            bias, alone = (state.bias(given, device) for given in (mask, None))
            assert bias is not None and alone is not None and bias.shape == alone.shape == (2, 1, 1, 50 + step)
            state.finish(True)
    state.crop(5)
    state.begin([], 2, 1)
    cropped = state.bias(mask, device)
    assert cropped is not None and cropped.shape[3] == 53 - 5 + 1


# ---- layers with short convolutions beside their keys


@pytest.fixture(params=["inkling2", "inkling_mm_model"])
def hybrid(request: pytest.FixtureRequest) -> Case:
    return tiny(request.param)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"prompt_lookup_num_tokens": 3, "max_new_tokens": 12},
    ],
    ids=str,
)
@torch.no_grad()
def test_convolutions_go_along_with_the_keys(hybrid: Case, settings: dict) -> None:
    given = hybrid if "prompt_lookup_num_tokens" in settings else batch(hybrid)
    settings = {"max_new_tokens": 8, **settings}
    torch.manual_seed(0)
    dense = given.model.generate(**given.inputs, **settings)
    with patched(given.model, WHOLE):
        torch.manual_seed(0)
        assert torch.equal(given.model.generate(**given.inputs, **settings), dense)


@torch.no_grad()
def test_hybrid_layers_are_reset_and_not_offloaded(hybrid: Case) -> None:
    cache = DynamicCache(config=hybrid.model.config)
    with patched(hybrid.model, QUARTER):
        first = hybrid.model(**hybrid.inputs, past_key_values=cache).logits
        assert isinstance(cache.layers[1], HybridLayer) and cache.get_seq_length() == first.shape[1]
        with pytest.raises(CacheError, match="cannot be offloaded"):
            cache.layers[1].offload()
        with pytest.raises(RuntimeError, match="does not track past states"):
            cache.crop(-1)
        cache.layers[1].batch_select_indices(torch.tensor([0, 0]))
        assert {len(x) for x in cache.layers[1].conv_states.values()} == {2} == {len(cache.layers[1].keys)}
        cache.layers[1].reset()
        assert cache.layers[1].get_seq_length() == 0 and cache.gaze.length == 0
        assert not any(cache.layers[1].has_previous_state.values())
        assert not any(x.any() for x in cache.layers[1].conv_states.values())
