"""Calls of a patched model in which nothing gazes: without images, without a way to find them, or with too few."""

from __future__ import annotations

import pytest
import torch
from patching import SMALL
from tiny import Case, tiny

from gazepatch.patch import patched, stats
from gazepatch.verification import generate_logits


def test_a_text_only_call_is_as_if_unpatched(ran: Case) -> None:
    text = {"input_ids": torch.tensor([[1, 5, 7, 9]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    dense = generate_logits(ran.model, text, 6)[0]
    with patched(ran.model, SMALL):
        assert torch.equal(generate_logits(ran.model, text, 6)[0], dense)
        assert stats(ran.model).steps == 0
        assert stats(ran.model).read_share == 0.0


def test_image_tokens_without_an_image_are_transformers_own_business(ran: Case) -> None:
    without = {name: value for name, value in ran.inputs.items() if name != "pixel_values"}
    with torch.no_grad():
        dense = ran.model(**without).logits
        with patched(ran.model, SMALL):
            assert torch.equal(ran.model(**without).logits, dense)


def test_pixels_without_image_tokens_are_refused_as_unpatched(ran: Case) -> None:
    text = {**ran.inputs, "input_ids": torch.full_like(ran.inputs["input_ids"], 5)}
    with pytest.raises(Exception) as unpatched:
        ran.model(**text)
    with patched(ran.model, SMALL), pytest.raises(type(unpatched.value)):
        ran.model(**text)


def test_embeddings_without_ids_are_read_whole_with_a_warning(ran: Case, caplog: pytest.LogCaptureFixture) -> None:
    embeddings = ran.model.get_input_embeddings()(ran.inputs["input_ids"])
    with torch.no_grad():
        dense = ran.model(inputs_embeds=embeddings).logits
        with patched(ran.model, SMALL):
            assert torch.equal(ran.model(inputs_embeds=embeddings).logits, dense)
            ran.model(inputs_embeds=embeddings)
    assert [r.levelname for r in caplog.records if "without input_ids" in r.message] == ["WARNING"]


def test_a_model_that_prunes_visual_tokens_reads_whole_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    case = tiny("nemotron_h_omni", video=True)
    case.model.video_pruning_rate = 0.5
    with torch.no_grad():
        dense = case.model(**case.inputs).logits
        with patched(case.model, SMALL):
            assert torch.equal(case.model(**case.inputs).logits, dense)
    assert dense.shape[1] < case.inputs["input_ids"].shape[1]
    assert [r.levelname for r in caplog.records if f"with {dense.shape[1]} tokens for" in r.message] == ["WARNING"]


def test_few_visual_tokens_are_read_whole(ran: Case) -> None:
    dense = generate_logits(ran.model, ran.inputs, 4)[0]
    with patched(ran.model, SMALL, min_visual_tokens=10_000):
        whole = generate_logits(ran.model, ran.inputs, 4)[0]
        assert stats(ran.model).read_share == 1.0
    assert (whole - dense).abs().max() <= 1e-5 * dense.abs().max()
