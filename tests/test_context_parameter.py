"""The parameter that holds context tokens: what it may be, what becomes of it, and where it is first taken from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from contexts import GAZE, context
from tiny import Case, tiny
from torch import nn

import gazepatch
from gazepatch.errors import ConfigError, PatchError
from gazepatch.patch import apply, context_tokens_of, patched, restore
from gazepatch.verification import fingerprint, generate_logits, verify


@pytest.fixture
def case() -> Case:
    return tiny("llava")


def test_the_parameter(case: Case) -> None:
    generate_logits(case.model, case.inputs, 1)
    names, before = [name for name, _ in case.model.named_parameters()], fingerprint(case.model)
    apply(case.model, GAZE, context_tokens=context())
    held = context_tokens_of(case.model)
    assert isinstance(held, nn.Parameter) and held.requires_grad and torch.equal(held, context())
    (own,) = {name for name, _ in case.model.named_parameters()} - set(names)
    assert own.endswith("language_model.gaze_context_tokens")
    assert any(p is held for p in case.model.parameters())
    case.model.to(torch.bfloat16)
    assert context_tokens_of(case.model).dtype == torch.bfloat16
    restore(case.model)
    case.model.float()
    assert [name for name, _ in case.model.named_parameters()] == names
    assert fingerprint(case.model) == before


def test_a_given_parameter_is_used_itself(case: Case) -> None:
    given = nn.Parameter(context())
    apply(case.model, GAZE, context_tokens=given)
    assert context_tokens_of(case.model) is given
    case.model(**case.inputs, labels=case.inputs["input_ids"]).loss.backward()
    assert given.grad is not None
    restore(case.model)
    tensor = context()
    apply(case.model, GAZE, context_tokens=tensor)
    context_tokens_of(case.model).data.zero_()
    assert torch.equal(tensor, context())


def offloaded(model: Any, folder: Path) -> Any:
    """The model, with the weights of its text decoder on the disk."""
    accelerate = pytest.importorskip("accelerate")
    parts = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    return accelerate.dispatch_model(model, parts | {"model.language_model": "disk"}, offload_dir=folder)


def test_a_decoder_that_is_offloaded(case: Case, tmp_path: Path) -> None:
    tokens = gazepatch.initial_context_tokens(case.model, 2)
    with patched(case.model, GAZE, context_tokens=tokens):
        expected, said = generate_logits(case.model, case.inputs, 2)
    model = offloaded(case.model, tmp_path)
    assert torch.equal(gazepatch.initial_context_tokens(model, 2), tokens)
    with patched(model, GAZE, context_tokens=tokens):
        torch.testing.assert_close(generate_logits(model, case.inputs, 2, said)[0], expected)


def test_offloading_comes_before_apply(case: Case, tmp_path: Path) -> None:
    model = offloaded(apply(case.model, GAZE, context_tokens=context()), tmp_path)
    with pytest.raises(PatchError, match=r"offload it, before gazepatch\.apply"):
        model(**case.inputs)


def test_other_precisions(case: Case) -> None:
    case.model.to(torch.bfloat16)
    inputs = {**case.inputs, "pixel_values": case.inputs["pixel_values"].to(torch.bfloat16)}
    with patched(case.model, GAZE, context_tokens=context()):
        assert context_tokens_of(case.model).dtype == torch.bfloat16
        assert verify(case.model, inputs).passed
    with patched(case.model, GAZE, context_tokens=nn.Parameter(context())):  # float32, as one trains them
        case.model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert context_tokens_of(case.model).grad.dtype == torch.float32


@pytest.mark.parametrize(
    "tokens, message",
    [
        (torch.zeros(4, 63), r"shape \[M, 64\] with M >= 1, got \[4, 63\]"),
        (torch.zeros(0, 64), r"got \[0, 64\]"),
        (torch.zeros(64), r"got \[64\]"),
        (torch.zeros(4, 64, dtype=torch.long), r"floating-point numbers, got torch.int64"),
        (torch.full((4, 64), float("nan")), "must be finite"),
        (torch.full((4, 64), float("inf")), "must be finite"),
        ([[0.0] * 64], "must be a tensor .* got list"),
        (torch.zeros(3, 64), "ask for 4 context tokens, got 3"),
    ],
    ids=["hidden size", "none", "one dimension", "integers", "NaN", "infinity", "list", "other number"],
)
def test_wrong_context_tokens_change_nothing(case: Case, tokens: Any, message: str) -> None:
    before = fingerprint(case.model)
    with pytest.raises(ConfigError, match=message):
        apply(case.model, replace(GAZE, context_tokens=4), context_tokens=tokens)
    assert fingerprint(case.model) == before


def test_the_models_own_files_stay_as_they_were(case: Case, tmp_path: Any) -> None:
    names = set(case.model.state_dict())
    apply(case.model, GAZE, context_tokens=context())
    case.model.save_pretrained(tmp_path)
    loaded, report = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert set(loaded.state_dict()) == names
    assert not report["unexpected_keys"] and not report["missing_keys"]
    assert "gaze" not in (tmp_path / "config.json").read_text()


def test_verify_keeps_the_parameter(case: Case) -> None:
    given = nn.Parameter(context())
    apply(case.model, GAZE, context_tokens=given)
    report = verify(case.model, case.inputs)
    assert report.passed, report
    assert context_tokens_of(case.model) is given


def test_initial_context_tokens(case: Case) -> None:
    table = case.model.get_input_embeddings().weight
    tokens = gazepatch.initial_context_tokens(case.model, 400)
    assert tokens.shape == (400, 64) and not tokens.requires_grad
    assert (tokens.std() / table.std() - 1).abs() < 0.1
    assert torch.equal(tokens, gazepatch.initial_context_tokens(case.model, 400))
    assert not torch.equal(tokens, gazepatch.initial_context_tokens(case.model, 400, seed=1))
    for count in (0, -1, 2.0, True):
        with pytest.raises(ConfigError, match="count must be an integer"):
            gazepatch.initial_context_tokens(case.model, count)


def test_initial_context_tokens_are_scaled_as_words_are() -> None:
    model = tiny("gemma3").model  # multiplies its embeddings by the root of their size
    words = model.get_input_embeddings()
    tokens = gazepatch.initial_context_tokens(model, 400)
    assert (tokens.std() / (words.weight.std() * model.config.text_config.hidden_size**0.5) - 1).abs() < 0.2


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ["embed_tokens"]}, {"target_modules": ["q_proj"], "trainable_token_indices": [3]}],
    ids=["adapted", "some trained"],
)
def test_initial_context_tokens_of_words_that_peft_trains(case: Case, settings: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    tokens = gazepatch.initial_context_tokens(case.model, 2)
    wrapped = peft.get_peft_model(case.model, peft.LoraConfig(r=2, **settings))
    assert torch.equal(gazepatch.initial_context_tokens(wrapped, 2), tokens)
