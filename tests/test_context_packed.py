"""Sequences packed into one row, with context tokens: each sees itself alone, as in a row of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from contexts import GAZE, context
from tiny import Case, batch, filled, tiny
from torch import Tensor

from gazepatch.errors import UnsupportedModelError
from gazepatch.patch import patch_of, patched


def packed(case: Case) -> dict[str, Tensor]:
    """Both rows of a batch after each other, as transformers takes it: without a mask, positions start again."""
    everything = filled(replace(case, rows=[[media for row in case.rows for media in row]])).inputs
    lengths = case.inputs["attention_mask"].sum(1).tolist()
    ids = torch.cat([row[-length:] for row, length in zip(case.inputs["input_ids"], lengths, strict=True)])[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    inputs = everything | {"input_ids": ids, "position_ids": positions, "use_cache": False}
    del inputs["attention_mask"]
    return inputs


# Full attention, where an image is a row of tiles, and sliding windows shorter than an image.
@pytest.mark.parametrize("name", ["llava", "mistral3", "internvl_short"])
@pytest.mark.parametrize("prefill", ["dense", "gaze"])
@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(name: str, prefill: str) -> None:
    case = batch(tiny(name))
    rows, lengths = case.inputs["input_ids"], case.inputs["attention_mask"].sum(1).tolist()
    with patched(case.model, GAZE, prefill=prefill, context_tokens=context()):
        together = case.model(**packed(case)).logits[0].split(lengths)
        for i, length in enumerate(lengths):
            alone = filled(replace(case, rows=[case.rows[i]])).inputs | {"input_ids": rows[i : i + 1, -length:]}
            expected = case.model(**alone, use_cache=False).logits[0]
            torch.testing.assert_close(together[i], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{"context_tokens": context()}, {}], ids=["context tokens", "prompts that gaze"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_flash_attention_cannot_keep_them_apart(settings: dict[str, Any], use_cache: bool) -> None:
    case = batch(tiny("llava"))
    with patched(case.model, GAZE, **settings):
        patch_of(case.model).runtime.flash = True
        with pytest.raises(UnsupportedModelError, match="give each sequence a row of its own"):
            case.model(**packed(case) | {"use_cache": use_cache})
