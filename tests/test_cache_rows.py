"""Rows of a gaze cache that are chosen, repeated, and laid out differently."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from stepping import QUARTER, WHOLE, static
from tiny import Case, batch, tiny
from torch import Tensor
from transformers import DynamicCache

from gazepatch.patch import patched, trace

STEP = torch.tensor([[5]])


@pytest.fixture
def pair() -> Case:
    """Two rows of different images."""
    return batch(tiny("llava"))


def of_rows(case: Case, rows: list[int]) -> dict[str, Tensor]:
    """A step after these rows of the prompt."""
    mask = case.inputs["attention_mask"][rows]
    mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    positions = mask.sum(1, keepdim=True) - 1
    return {"input_ids": STEP.expand(len(rows), -1), "attention_mask": mask, "position_ids": positions}


@pytest.mark.parametrize(
    ("chosen", "rows"),
    [([False, True], [1]), ([True, True], [0, 1]), ([1, 0], [1, 0]), ([-1, -1], [1, 1])],
    ids=["mask", "mask of all", "numbers", "from the end"],
)
@pytest.mark.parametrize("kind", ["dynamic", "static", "few visual tokens"])
@torch.no_grad()
def test_rows_are_chosen_by_number_or_mask(pair: Case, kind: str, chosen: list[Any], rows: list[int]) -> None:
    if kind == "static" and len(rows) < 2:
        pytest.skip("a static cache keeps its rows")
    with patched(pair.model, QUARTER, min_visual_tokens=10**6 if kind == "few visual tokens" else 0):
        cache, whole = static(pair) if kind == "static" else DynamicCache(), DynamicCache()
        for each in (cache, whole):
            pair.model(**pair.inputs, past_key_values=each)
        expected = pair.model(**of_rows(pair, [0, 1]), past_key_values=whole).logits[rows]
        cache.batch_select_indices(torch.tensor(chosen))
        actual = pair.model(**of_rows(pair, rows), past_key_values=cache).logits
        torch.testing.assert_close(actual, expected)
        assert {span.row for span in cache.gaze.spans} == set(range(len(rows)))


@torch.no_grad()
def test_a_trace_that_begins_when_rows_were_chosen(pair: Case) -> None:
    with patched(pair.model, QUARTER):
        caches = DynamicCache(), DynamicCache()
        for cache in caches:
            pair.model(**pair.inputs, past_key_values=cache)
        with trace(pair.model) as both:
            pair.model(**of_rows(pair, [0, 1]), past_key_values=caches[0])
        caches[1].batch_select_indices(torch.tensor([1]))
        with trace(pair.model) as second:
            pair.model(**of_rows(pair, [1]), past_key_values=caches[1])
        first = both.regions[1][0].span
        assert second.regions[0] == [region._replace(span=region.span - first) for region in both.regions[1]]
        assert second.steps == [{layer: rows[1:] for layer, rows in step.items()} for step in both.steps]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_a_mask_of_one_row_for_all(pair: Case, kind: str) -> None:
    # Nobody is hidden from anybody: the mask of a batch without padding, as one row.
    ids = pair.inputs["input_ids"]
    inputs = {**pair.inputs, "attention_mask": torch.ones_like(ids)}
    case = dataclasses.replace(pair, inputs=inputs)
    with patched(case.model, WHOLE):
        cache, alone = (static(case) if kind == "static" else DynamicCache() for _ in range(2))
        for each in (cache, alone):
            case.model(**inputs, past_key_values=each)
        length = 300 if kind == "static" else ids.shape[1] + 1
        visible = (torch.arange(length) <= ids.shape[1])[None, None, None]
        step = {"input_ids": STEP.expand(2, -1)}
        expected = case.model(**step, attention_mask=visible.expand(2, -1, -1, -1), past_key_values=alone).logits
        actual = case.model(**step, attention_mask=visible, past_key_values=cache).logits
        torch.testing.assert_close(actual, expected)


@torch.no_grad()
def test_rows_without_images_forget_text_as_far_as_it_goes() -> None:
    case = tiny("llava")
    image, ids = case.inputs["input_ids"], torch.full_like(case.inputs["input_ids"], 11)
    with patched(case.model, QUARTER, context_tokens=torch.randn(3, 64)):
        cache, length = DynamicCache(), ids.shape[1]
        both = torch.cat([image, ids])
        case.model(input_ids=both, pixel_values=case.inputs["pixel_values"], past_key_values=cache)
        cache.batch_select_indices(torch.tensor([1]))
        cache.crop(-2)
        assert cache.get_seq_length() == length - 2
        step = {"input_ids": STEP, "past_key_values": cache, "position_ids": torch.tensor([[length - 2]])}
        expected = case.model(input_ids=torch.cat([ids[:, :-2], STEP], 1)).logits[:, -1]
        torch.testing.assert_close(case.model(**step).logits[:, -1], expected, rtol=1e-4, atol=1e-4)
