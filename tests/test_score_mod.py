"""Soft caps and sinks in whole models: honoured wherever the model's own attention honours them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import Case, batch, tiny

from gazepatch.conformance import QUARTER, WHOLE, _spied
from gazepatch.patch import patched
from gazepatch.running import attention, prompt
from gazepatch.running.arguments import scores_of
from gazepatch.score_mod import ScoreMod
from gazepatch.verification import generate_logits

NAMES = ["internvl_gpt_oss", "paligemma_gemma2"]
every_name = pytest.mark.parametrize("name", NAMES)


def eager(name: str) -> Case:
    """Its text decoder with eager attention, the default of later versions of transformers."""
    case = tiny(name)
    case.model.get_decoder().set_attn_implementation("eager")
    return case


def attention_of(case: Case) -> list[Any]:
    """The attention modules that gaze."""
    return [module for module in case.model.get_decoder().modules() if getattr(module, "layer_idx", None) == 1]


@every_name
@torch.no_grad()
def test_what_the_model_has_is_honoured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = batch(eager(name))
    dense, tokens = generate_logits(case.model, case.inputs, 4)
    settings = replace(WHOLE, prefill="gaze")
    with patched(case.model, settings), _spied(case.model) as steps:
        whole, _ = generate_logits(case.model, case.inputs, 4, tokens)
    torch.testing.assert_close(whole, dense, atol=2e-5, rtol=1e-5)
    if name == "paligemma_gemma2":
        assert all(step.score_mod.softcap == 2.0 and step.score_mod.sinks is None for step in steps)
    else:
        (own,) = {module.sinks for module in attention_of(case) if hasattr(module, "sinks")}
        assert all(step.score_mod.softcap is None and torch.equal(step.score_mod.sinks[0, :, 0], own) for step in steps)
    # It is large enough in these models for its absence to show.
    monkeypatch.setattr(attention, "scores_of", lambda original, query, options: ScoreMod(options["scaling"]))
    with patched(case.model, settings):
        without, _ = generate_logits(case.model, case.inputs, 4, tokens)
    assert (without - dense).abs().max() > 1e-2


def test_sinks_are_trained_with_gaze() -> None:
    case = eager("internvl_gpt_oss")
    case.model.train()
    (sinks,) = {module.sinks for module in attention_of(case) if hasattr(module, "sinks")}
    case.model(**case.inputs, labels=case.inputs["input_ids"]).loss.backward()
    dense, sinks.grad = sinks.grad, None
    assert dense.abs().max() > 1e-3
    with patched(case.model, WHOLE, prefill="gaze"):
        case.model(**case.inputs, labels=case.inputs["input_ids"]).loss.backward()
    torch.testing.assert_close(sinks.grad, dense, atol=1e-5, rtol=1e-4)


@every_name
@torch.no_grad()
def test_own_images_under_flash_attention_are_those_of_eager(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, calls = eager(name), []

    def noted(call: Any, own: Any, original: str, dense: torch.Tensor) -> torch.Tensor:
        calls.append((call, own, dense))
        return prompt.see_own_image(call, own, original, dense)

    monkeypatch.setattr(attention, "see_own_image", noted)
    with patched(case.model, QUARTER, context_tokens=torch.randn(3, 64)):
        case.model(**case.inputs)
    call, own, dense = calls[1]
    call.mask = None
    outputs = [prompt.see_own_image(call, own, original, dense) for original in ("flash_attention_2", "eager")]
    assert torch.equal(*outputs) and not torch.equal(outputs[0], dense)
    # Older versions use sdpa, which leaves out soft caps, as does gaze.
    assert scores_of("sdpa", call.query, call.options) == ScoreMod(call.options["scaling"])
