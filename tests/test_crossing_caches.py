"""Caches of models whose images are the keys of cross-attention layers: turns, beams, rows, and undoing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from crossing import CASES, FAR, QUARTER, WHOLE, Talk, close, plainly, talk
from tiny import IMAGE, Case, built, tiny
from tiny.crossing import ROOM, TILE, seen_after, tiled
from torch import Tensor

import gazepatch
from gazepatch.config import GazeConfig
from gazepatch.errors import CacheError
from gazepatch.patch import patched, stats
from gazepatch.verification import generate_logits


@pytest.fixture
def case() -> Case:
    return built("mllama")


@pytest.mark.parametrize("config", [QUARTER, FAR], ids=["alone", "periphery"])
def test_a_later_turn_brings_an_image(case: Case, config: GazeConfig) -> None:
    torch.manual_seed(1)
    dense = talk(case)
    torch.manual_seed(1)
    with patched(case.model, WHOLE):
        close(talk(case), dense)
    for prefill in ("dense", "gaze"):
        torch.manual_seed(1)
        with plainly(case.model, config, prompts=prefill == "gaze"):
            expected = talk(case)
        torch.manual_seed(1)
        with patched(case.model, config, prefill=prefill):
            close(talk(case), expected)


def test_a_later_turn_of_words(case: Case) -> None:
    def turns() -> Tensor:
        first = case.model.generate(**case.inputs, max_new_tokens=3, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, torch.tensor([[30, 31, 32]])], 1)
        mask = case.inputs["cross_attention_mask"]
        mask = torch.cat([mask, mask[:, -1:].expand(-1, ids.shape[1] - mask.shape[1], -1, -1)], 1)
        texts = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "cross_attention_mask": mask}
        return case.model.generate(**texts, past_key_values=first.past_key_values, max_new_tokens=4)

    dense = turns()
    with patched(case.model, WHOLE):
        assert torch.equal(turns(), dense)
    with plainly(case.model, QUARTER):
        expected = turns()
    with patched(case.model, QUARTER):
        assert torch.equal(turns(), expected)
    assert not torch.equal(expected, dense)


def test_words_then_an_image(case: Case) -> None:
    def turns() -> Tensor:
        said, image = Talk(case), tiled(2, 2)
        logits = [said.say(torch.tensor([[1, 5, 6, 7]])), said.say(torch.tensor([[8]]))]
        mask = seen_after(torch.tensor([[1, 5, 6, 7, 8, IMAGE, 9, 10]]), [[image]])["cross_attention_mask"]
        logits.append(said.say(torch.tensor([[IMAGE, 9]]), [image], mask))
        return torch.cat([*logits, said.say(torch.tensor([[10]]), (), mask)], 1)

    torch.manual_seed(2)
    with plainly(case.model, QUARTER):
        expected = turns()
    torch.manual_seed(2)
    with patched(case.model, QUARTER):
        close(turns(), expected)
        assert stats(case.model).steps == 1


def test_a_mask_may_change_from_step_to_step(case: Case) -> None:
    ids, mask = case.inputs["input_ids"], case.inputs["cross_attention_mask"]
    rows = [mask[:, -1:].clone() for _ in range(4)]
    rows[1][:, :, 0], rows[2][:, :, 1], rows[3][:, :, 1, 0] = 0, 0, 0
    mask = torch.cat([mask, *rows], 1)

    def steps() -> Tensor:
        said = Talk(case)
        said.say(ids, case.rows[0], mask)
        return torch.cat([said.say(torch.tensor([[20 + i]]), (), mask) for i in range(4)], 1)

    for config in (QUARTER, FAR):
        with plainly(case.model, config):
            expected = steps()
        with patched(case.model, config), gazepatch.trace(case.model) as trace:
            close(steps(), expected)
            entries = stats(case.model).layers[1].visual_entries
        assert entries == 2 * 36 * (5 + 3 + 2 + 4)
        # Where other images are seen than before, the trace starts again.
        assert len(trace.steps) == 1 and [(s.media, s.tile) for s in trace.spans] == [(0, 0), (0, 1), (1, 1), (1, 2)]


def test_text_alone_is_as_if_unpatched(case: Case) -> None:
    texts = {"input_ids": torch.tensor([[1, 5, 7, 9]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    dense = generate_logits(case.model, texts, 4)[0]
    with patched(case.model, QUARTER):
        assert torch.equal(generate_logits(case.model, texts, 4)[0], dense)
        assert stats(case.model).steps == 0


@pytest.mark.parametrize("rows", ["one row", "two rows"])
def test_beam_search(case: Case, rows: str) -> None:
    case = case if rows == "one row" else CASES["different numbers of images"]()
    search = {"num_beams": 3, "max_new_tokens": 5, "output_scores": True, "return_dict_in_generate": True}
    dense = case.model.generate(**case.inputs, **search)
    with patched(case.model, WHOLE):
        assert torch.equal(case.model.generate(**case.inputs, **search).sequences, dense.sequences)
    with plainly(case.model, FAR):
        expected = case.model.generate(**case.inputs, **search)
    with patched(case.model, FAR):
        found = case.model.generate(**case.inputs, **search)
    assert torch.equal(found.sequences, expected.sequences)
    close(found.sequences_scores, expected.sequences_scores)


def test_guesses_that_are_taken_back_leave_the_images(case: Case) -> None:
    """Which transformers' own cache forgets a part of (5.23)."""
    greedy = case.model.generate(**case.inputs, max_new_tokens=6)
    with patched(case.model, WHOLE):
        guessed = case.model.generate(**case.inputs, max_new_tokens=6, prompt_lookup_num_tokens=2)
    assert torch.equal(guessed, greedy)


def test_rows_of_a_cache() -> None:
    """Two rows that see different images change places, then one of them goes on alone, twice."""
    pair = CASES["different numbers of images"]()
    mask = pair.inputs["cross_attention_mask"][:, -1:]
    with patched(pair.model, QUARTER), torch.no_grad():
        prompt = pair.model(**pair.inputs)

        def step(cache: Any, rows: list[int]) -> Tensor:
            attention = torch.cat([pair.inputs["attention_mask"][rows], torch.ones(len(rows), 1, dtype=torch.long)], 1)
            texts = {"input_ids": torch.full((len(rows), 1), 20), "attention_mask": attention}
            return pair.model(**texts, past_key_values=cache, cross_attention_mask=grown(rows)).logits

        def grown(rows: list[int]) -> Tensor:
            return torch.cat([pair.inputs["cross_attention_mask"], mask], 1)[rows]

        cache = prompt.past_key_values
        expected = step(cache, [0, 1])
        cache.crop(-1)
        cache.reorder_cache(torch.tensor([1, 0]))
        close(step(cache, [1, 0]), expected[[1, 0]])
        cache.crop(-1)
        cache.batch_select_indices(torch.tensor([0]))
        cache.batch_repeat_interleave(2)
        close(step(cache, [1, 1]), expected[[1, 1]])


def test_two_models_and_two_caches_share_nothing() -> None:
    first, second = tiny("mllama"), tiny("mllama", seed=5)
    alone = []
    for each in (first, second):
        with patched(each.model, QUARTER):
            alone.append(generate_logits(each.model, each.inputs, 2))
    with patched(first.model, QUARTER), patched(second.model, FAR, budget=0.5), torch.no_grad():
        talks = [Talk(first), Talk(first)]
        for one, said in zip((first, second), talks, strict=True):  # other images in each
            mask = one.inputs["cross_attention_mask"]
            said.say(one.inputs["input_ids"], one.rows[0], torch.cat([mask, mask[:, -1:]], 1))
            generate_logits(second.model, second.inputs, 1)
        token = alone[0][1][:, :1]
        mask = first.inputs["cross_attention_mask"]
        mask = torch.cat([mask, mask[:, -1:]], 1)
        close(talks[0].say(token, (), mask)[:, -1], alone[0][0][:, 1])
        with pytest.raises(CacheError, match="another model"):
            second.model(input_ids=token, past_key_values=talks[0].cache)
    with pytest.raises(CacheError):
        first.model(input_ids=token, past_key_values=talks[1].cache)


def test_a_cache_is_emptied_and_used_again(case: Case) -> None:
    with patched(case.model, QUARTER), torch.no_grad():
        cache = transformers.DynamicCache()
        expected = case.model(**case.inputs, past_key_values=cache).logits
        layer = cache.layers[1]
        assert layer.keys.shape[2] == layer.values.shape[2] == layer.get_seq_length() == 2 * ROOM * TILE
        assert cache.get_seq_length() == case.inputs["input_ids"].shape[1]
        cache.reset()
        assert cache.get_seq_length() == 0 and layer.keys is None
        assert torch.equal(case.model(**case.inputs, past_key_values=cache).logits, expected)


def test_keys_are_copied_once() -> None:
    """A decode step adds nothing to what a cross-attention layer holds, and hands out no copy of it."""
    case = CASES["all tiles"]()
    with patched(case.model, FAR), torch.no_grad():
        cache = transformers.DynamicCache()
        prompt = case.model(**case.inputs, past_key_values=cache)
        held = [tensor.data_ptr() for tensor in cache.layers[1].entries()]
        ids = prompt.logits[:, -1:].argmax(-1)
        mask = case.inputs["cross_attention_mask"]
        attention = torch.cat([case.inputs["attention_mask"], torch.ones_like(ids)], 1)
        seen = torch.cat([mask, mask[:, -1:]], 1)
        case.model(input_ids=ids, attention_mask=attention, cross_attention_mask=seen, past_key_values=cache)
        assert [tensor.data_ptr() for tensor in cache.layers[1].entries()] == held
