"""Static caches of models whose images are the keys of cross-attention layers: as dynamic ones, and nothing moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from crossing import CASES, FAR, QUARTER, Talk, close, talk
from stepping import SETTINGS, assert_same, compiled, generate, static
from tiny import IMAGE, Case, built, tiny
from tiny.crossing import seen_after, tiled
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DynamicCache, MllamaForConditionalGeneration, StaticCache

from gazepatch.caches.cross_attention import StaticCrossLayer
from gazepatch.patch import patched, stats, trace

pytestmark = pytest.mark.skipif(
    "_prepare_static_cache" not in vars(MllamaForConditionalGeneration),
    reason="this transformers itself cannot make mllama a static cache",
)


@pytest.fixture
def case() -> Case:
    return built("mllama")


@pytest.mark.parametrize("name", CASES)
def test_a_static_cache_answers_as_a_dynamic_one(name: str, fresh: None) -> None:
    case = CASES[name]()
    dense = generate(case, cache_implementation="static")
    for of_settings, config in SETTINGS.items():
        with patched(case.model, config):
            with trace(case.model) as read:
                expected, counted = generate(case), stats(case.model)
            for settings in ({"cache_implementation": "static"}, compiled()):
                with trace(case.model) as found:
                    assert_same(actual := generate(case, **settings), expected)
                assert stats(case.model) == counted and counted.steps == 5, of_settings
                assert found.steps == read.steps
            if config.budget == 1.0:
                assert_same(actual, dense)
    assert_same(generate(case, cache_implementation="static"), dense)


def test_steps_compile_once(case: Case, fresh: None) -> None:
    with patched(case.model, FAR):
        expected = generate(case, **compiled())
        assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
        with torch.compiler.set_stance("fail_on_recompile"):
            assert_same(generate(case, **compiled()), expected)


@pytest.mark.parametrize("prefill", ["dense", "gaze"])
def test_a_later_turn_brings_an_image(case: Case, prefill: str) -> None:
    with patched(case.model, FAR, prefill=prefill):
        logits = []
        for cache in (DynamicCache(), static(case)):
            torch.manual_seed(1)
            logits.append(talk(case, cache))
            assert stats(case.model).steps == 2
        close(*logits)


def test_an_image_that_comes_alone(case: Case) -> None:
    """As the only token of a forward, which then reads it whole in both cases."""

    def turns(cache: Any) -> Tensor:
        said, image = Talk(case, cache), tiled(2, 2)
        said.say(torch.tensor([[1, 5, 6, 7]]))
        mask = seen_after(torch.tensor([[1, 5, 6, 7, IMAGE, 9, 10]]), [[image]])["cross_attention_mask"]
        logits = [said.say(torch.tensor([[IMAGE]]), [image], mask)]
        return torch.cat([*logits, *(said.say(torch.tensor([[token]]), (), mask) for token in (9, 10))], 1)

    with patched(case.model, QUARTER, budget=1.0):
        torch.manual_seed(2)
        expected = turns(DynamicCache())
        torch.manual_seed(2)
        close(turns(static(case)), expected)


def test_words_alone(case: Case) -> None:
    texts = {"input_ids": torch.tensor([[1, 5, 7, 9]]), "max_new_tokens": 4}
    dense = case.model.generate(**texts)
    with patched(case.model, QUARTER):
        assert torch.equal(case.model.generate(**texts, cache_implementation="static"), dense)
        assert stats(case.model).steps == 0


def test_a_mask_may_change_from_step_to_step(case: Case) -> None:
    ids, mask = case.inputs["input_ids"], case.inputs["cross_attention_mask"]
    rows = [mask[:, -1:].clone() for _ in range(4)]
    rows[1][:, :, 0], rows[2][:, :, 1], rows[3][:, :, 1, 0] = 0, 0, 0
    mask = torch.cat([mask, *rows], 1)

    def steps(cache: Any) -> Tensor:
        said = Talk(case, cache)
        said.say(ids, case.rows[0], mask)
        return torch.cat([said.say(torch.tensor([[20 + i]]), (), mask) for i in range(4)], 1)

    with patched(case.model, FAR):
        expected, counted = steps(DynamicCache()), stats(case.model)
        close(steps(static(case)), expected)
        assert stats(case.model) == counted


@pytest.mark.parametrize("given", ["another mask", "no mask"])
@torch.no_grad()
def test_a_compiled_step_that_sees_other_images_fails(case: Case, given: str, fresh: None) -> None:
    mask = case.inputs["cross_attention_mask"]
    with patched(case.model, QUARTER):
        cache = static(case)
        case.model(**case.inputs, past_key_values=cache)
        step = torch.compile(case.model.forward, backend="eager", fullgraph=True)
        one = {"input_ids": torch.tensor([[5]]), "past_key_values": cache}
        step(**one, cross_attention_mask=mask[:, -1:])
        other = None
        if given == "another mask":
            other = mask[:, -1:].clone()
            other[:, :, 0] = 0
        with pytest.raises(RuntimeError, match="must see the images that the token before it saw"):
            step(**one, cross_attention_mask=other)


@pytest.mark.parametrize("rows", ["one row", "two rows"])
def test_beams(case: Case, rows: str) -> None:
    case = case if rows == "one row" else CASES["different numbers of images"]()
    with patched(case.model, FAR):
        expected, counted = generate(case, num_beams=3), stats(case.model)
        assert torch.equal(generate(case, num_beams=3, cache_implementation="static").sequences, expected.sequences)
        assert stats(case.model) == counted


@torch.no_grad()
def test_rows_that_change_places() -> None:
    pair = CASES["different numbers of images"]()
    seen = pair.inputs["cross_attention_mask"][:, -1:]
    with patched(pair.model, QUARTER):
        logits = []
        for cache in (DynamicCache(), static(pair)):
            pair.model(**pair.inputs, past_key_values=cache)
            cache.reorder_cache(torch.tensor([1, 0]))
            attention = torch.cat([pair.inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)[[1, 0]]
            one = {"input_ids": torch.full((2, 1), 20), "attention_mask": attention}
            logits.append(pair.model(**one, past_key_values=cache, cross_attention_mask=seen[[1, 0]]).logits)
        close(*logits)


def test_guesses_that_are_taken_back_leave_the_images(case: Case) -> None:
    settings = {"max_new_tokens": 6, "prompt_lookup_num_tokens": 2}
    with patched(case.model, QUARTER):
        expected = case.model.generate(**case.inputs, **settings)
        guessed = case.model.generate(**case.inputs, **settings, past_key_values=static(case))
    assert torch.equal(guessed, expected)


def addresses(cache: StaticCache) -> list[tuple[str, int]]:
    """Of what the layers of images hold, and of what steps write to besides."""
    layer = next(layer for layer in cache.layers if isinstance(layer, StaticCrossLayer))
    buffers = {"layer": layer._buffers, "state": layer.state._buffers, "counters": layer.state.counters.buffers}
    return [(name, memory.data_ptr()) for name, held in buffers.items() for memory in held._held.values()]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@torch.no_grad()
def test_nothing_moves(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    case, places = tiny("mllama"), []
    one = {"input_ids": torch.tensor([[5]]), "cross_attention_mask": case.inputs["cross_attention_mask"][:, -1:]}
    with patched(case.model, FAR, backend=backend):
        cache = static(case)
        for _ in range(2):
            cache.reset()
            assert cache.get_seq_length() == 0 and stats(case.model).steps in (0, 2)
            case.model(**case.inputs, past_key_values=cache)
            for _ in range(2):
                case.model(**one, past_key_values=cache)
                places.append(addresses(cache))
            cache.reorder_cache(torch.tensor([0]))
            places.append(addresses(cache))
    assert all(held == places[0] for held in places) and len(places[0]) > 5
