"""The static gaze cache gives the answers of the dynamic one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from stepping import (
    QUARTER,
    SETTINGS,
    WHOLE,
    assert_same,
    assert_statistics_of_copies,
    compiled,
    generate,
    image_turn,
    static,
    supported,
)
from tiny import Case, batch, tiny
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DynamicCache

from gazepatch.errors import CacheError
from gazepatch.patch import patch_of, patched, stats, trace


@pytest.fixture(params=["llava", "llava_latent"])
def case(request: pytest.FixtureRequest) -> Case:
    return tiny(request.param)


@pytest.mark.parametrize("rows", [1, 2], ids=["one row", "two rows"])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3", "kimi_k25", "mistral3_latent"])
def test_a_static_cache_answers_as_a_dynamic_one(name: str, rows: int) -> None:
    case = supported(name) if rows == 1 else batch(supported(name))
    dense = generate(case, cache_implementation="static")
    for of_settings, config in SETTINGS.items():
        with patched(case.model, config):
            expected, counted = generate(case), stats(case.model)
            actual = generate(case, cache_implementation="static")
            assert_same(actual, expected)
            assert stats(case.model) == counted and counted.steps == 5, of_settings
            if config.budget == 1.0:
                assert_same(actual, dense)
    assert_same(generate(case, cache_implementation="static"), dense)


def two_turns(case: Case, cache: Any, second: dict[str, Tensor]) -> Any:
    first = generate(case, past_key_values=cache).sequences
    ids = torch.cat([first, second["input_ids"]], 1)
    inputs = second | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return generate(dataclasses.replace(case, inputs=inputs), past_key_values=cache)


@pytest.mark.parametrize("late", [False, True], ids=["", "sorted then"])
@pytest.mark.parametrize("turn", ["text", "image"])
def test_a_second_turn(case: Case, turn: str, late: bool) -> None:
    second = image_turn(case) if turn == "image" else {"input_ids": torch.tensor([[11, 12, 13, 14]])}
    enough = sum(span.tokens for span in case.spans) + 1 if late else 0
    dense = two_turns(case, static(case), second)
    for config in (WHOLE, QUARTER):
        with patched(case.model, config, min_visual_tokens=enough):
            expected, counted = two_turns(case, DynamicCache(), second), stats(case.model)
            actual = two_turns(case, static(case), second)
            assert_same(actual, expected)
            assert stats(case.model) == counted
            if config is WHOLE:
                assert_same(actual, dense)


@torch.no_grad()
def test_statistics_are_of_the_cache_that_was_used_last(case: Case) -> None:
    assert_statistics_of_copies(case, static(case))


@torch.no_grad()
def test_rows_that_are_left_without_an_image_count_nothing(case: Case) -> None:
    image = case.inputs["input_ids"]
    inputs = {"input_ids": torch.cat([image, torch.full_like(image, 11)]), "pixel_values": case.inputs["pixel_values"]}
    with patched(case.model, QUARTER):
        cache = static(case)
        case.model(**inputs, past_key_values=cache)
        case.model(input_ids=torch.tensor([[5], [5]]), past_key_values=cache)
        counted = stats(case.model)
        cache.batch_select_indices(torch.tensor([1, 1]))
        case.model(input_ids=torch.tensor([[5], [5]]), past_key_values=cache)
        assert stats(case.model) == counted and counted.steps == 1


def test_beams(case: Case) -> None:
    pair = batch(case)
    with patched(case.model, QUARTER):
        expected, counted = generate(pair, num_beams=3), stats(case.model)
        assert torch.equal(generate(pair, num_beams=3, cache_implementation="static").sequences, expected.sequences)
        assert stats(case.model) == counted


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "llava_latent"])
def test_context_tokens(name: str, fresh: None) -> None:
    case = batch(tiny(name))
    tokens = torch.randn(3, case.model.config.get_text_config().hidden_size)
    with patched(case.model, SETTINGS["gaze prefill"], context_tokens=tokens):
        expected, counted = generate(case), stats(case.model)
        assert_same(generate(case, cache_implementation="static"), expected)
        assert_same(generate(case, **compiled()), expected)
        assert stats(case.model) == counted and counted.context_entries
        assert counters["stats"]["unique_graphs"] == 1


def test_context_tokens_in_a_second_turn(case: Case) -> None:
    with patched(case.model, QUARTER, context_tokens=torch.randn(3, 64)):
        for second in (image_turn(case), {"input_ids": torch.tensor([[11, 12, 13, 14]])}):
            assert_same(two_turns(case, static(case), second), two_turns(case, DynamicCache(), second))


def test_a_trace_of_static_steps(case: Case, fresh: None) -> None:
    with patched(case.model, QUARTER):
        with trace(case.model) as expected:
            generate(case)
        for settings in ({"cache_implementation": "static"}, compiled()):
            with trace(case.model) as actual:
                generate(case, **settings)
            assert actual.steps == expected.steps and len(actual.steps) == 5


def test_what_a_static_cache_refuses(case: Case) -> None:
    with patched(case.model, QUARTER), torch.no_grad():
        with pytest.raises(CacheError, match="room for 40 tokens, got"):
            case.model(**case.inputs, past_key_values=static(case, 40))
        cache = static(case)
        case.model(**case.inputs, past_key_values=cache)
        with pytest.raises(CacheError, match="keeps its 1 rows, got 2"):
            cache.batch_repeat_interleave(2)
    one = {"input_ids": torch.tensor([[5]]), "past_key_values": cache}
    with torch.no_grad():
        with pytest.raises(CacheError, match="start with a new cache after"):
            case.model(**one)
        with patched(case.model, QUARTER), pytest.raises(CacheError, match="patched again"):
            case.model(**one)
        filled = static(case)
        case.model(**case.inputs, past_key_values=filled)
        with patched(case.model, QUARTER), pytest.raises(CacheError, match="patch the model first"):
            case.model(input_ids=torch.tensor([[5]]), past_key_values=filled)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_step_of_other_rows_is_refused(case: Case, kind: str, backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    with torch.no_grad(), patched(case.model, QUARTER, backend=backend):
        cache = static(case) if kind == "static" else DynamicCache()
        case.model(**case.inputs, past_key_values=cache)
        with pytest.raises(CacheError, match=r"holds keys \(1, .*a step brought \(2, .*: keep its rows"):
            case.model(input_ids=torch.tensor([[5], [5]]), past_key_values=cache)


def test_steps_after_the_end_of_the_room(case: Case) -> None:
    pytest.importorskip("triton")
    with torch.no_grad(), patched(case.model, QUARTER, backend="triton"):
        cache = static(case, case.inputs["input_ids"].shape[1] + 1)
        case.model(**case.inputs, past_key_values=cache)
        one = {"input_ids": torch.tensor([[5]]), "past_key_values": cache}
        case.model(**one)
        held = [store.clone() for store in cache.layers[1]._other]
        case.model(**one)  # the device alone knows how many there are
        assert all(torch.equal(*pair) for pair in zip(cache.layers[1]._other, held, strict=True))
        with pytest.raises(CacheError, match=r"steps brought it to .*larger max_cache_len"):
            case.model(input_ids=torch.tensor([[5, 6]]), past_key_values=cache)


@torch.no_grad()
def test_half_precision_as_the_default(case: Case) -> None:
    with patched(case.model, SETTINGS["gaze prefill"]):
        expected = [generate(batch(case)), generate(case)]
        torch.set_default_dtype(torch.float16)
        try:
            actual = [generate(batch(case)), generate(case, cache_implementation="static")]
        finally:
            torch.set_default_dtype(torch.float32)
    for pair in zip(actual, expected, strict=True):
        assert_same(*pair)


@torch.no_grad()
def test_a_mask_over_all_the_room(case: Case) -> None:
    tokens, padded = case.inputs["input_ids"].shape[1], torch.zeros(1, 300, dtype=torch.long)
    padded[:, 1 : tokens + 1] = 1
    with patched(case.model, QUARTER):
        logits = []
        for length in (tokens, 300):
            cache = static(case)
            inputs = case.inputs | {"attention_mask": padded[:, :length]}
            logits.append(case.model(**inputs, past_key_values=cache).logits)
            assert stats(case.model).layers == {}  # no step yet
            step = {"input_ids": torch.tensor([[5]]), "attention_mask": padded[:, : max(length, tokens + 1)]}
            logits.append(case.model(**step, past_key_values=cache).logits)
            assert cache.gaze.spans == case.spans and stats(case.model).read_share < 1
        torch.testing.assert_close(logits[:2], logits[2:])


def test_sliding_windows_have_no_room_for_context_tokens() -> None:
    case = supported("gemma3")
    tokens = torch.randn(3, case.model.config.get_text_config().hidden_size)
    with patched(case.model, QUARTER, context_tokens=tokens), pytest.raises(CacheError, match="sliding windows"):
        generate(case, cache_implementation="static")


def test_a_step_that_failed_leaves_a_broken_cache(case: Case) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    with torch.no_grad(), patched(case.model, QUARTER):
        cache = static(case)
        case.model(**case.inputs, past_key_values=cache)
        hook = case.model.model.language_model.layers[1].register_forward_pre_hook(fail)
        one = {"input_ids": torch.tensor([[5]]), "past_key_values": cache}
        with pytest.raises(ZeroDivisionError):
            case.model(**one)
        hook.remove()
        with pytest.raises(CacheError, match="failed half-way"):
            case.model(**one)
        assert patch_of(case.model).runtime.running.forward is None
