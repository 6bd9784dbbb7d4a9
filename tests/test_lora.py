"""Adapters that somebody put on a model with PEFT: found, saved, loaded again, left out for a while."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapting import needs_peft
from tiny import Case, tiny

import gazepatch
from gazepatch import ArtefactError, GazeConfig
from gazepatch.lora import has_lora, without_lora

peft = pytest.importorskip("peft")

SETTINGS = GazeConfig(region=(3, 3, 1), budget=0.5, min_visual_tokens=0, prefill="gaze", context_tokens=2)


def on(model: Any) -> Any:
    settings = peft.LoraConfig(
        target_modules=r".*language_model.*(q|v)_proj", modules_to_save=["lm_head"], r=2, init_lora_weights=False
    )
    return peft.get_peft_model(model, settings)


def patched(model: Any) -> Any:
    return gazepatch.apply(model, SETTINGS, context_tokens=torch.randn(2, 64))


ORDERS: dict[str, Callable[[Any], Any]] = {"first": lambda model: patched(on(model)), "last": lambda m: on(patched(m))}


@pytest.fixture
def case() -> Case:
    return tiny("llava")


@pytest.fixture
def model(case: Case, tmp_path: Path) -> Any:
    case.model.save_pretrained(tmp_path / "base")
    return transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "base")


@torch.no_grad()
def logits(model: Any, case: Case) -> torch.Tensor:
    return model.eval()(**case.inputs).logits


@needs_peft
@pytest.mark.skipif(
    transformers.__version__.startswith("5.16"),
    reason="transformers 5.16 itself loads nothing of what PEFT trained beside the adapters",
)
@pytest.mark.parametrize("order", ORDERS)
def test_adapters_of_a_model_around_it_are_saved(case: Case, model: Any, order: str, tmp_path: Path) -> None:
    wrapped = ORDERS[order](model)
    with torch.no_grad():
        model.lm_head.modules_to_save.default.weight.mul_(1.1)
    loaded = gazepatch.load(gazepatch.save(wrapped, tmp_path / "saved"))
    torch.testing.assert_close(logits(loaded, case), logits(wrapped, case))
    assert not model._hf_peft_config_loaded, "these are not adapters of transformers"


def test_adapters_are_merged_before_a_full_artefact(case: Case, model: Any, tmp_path: Path) -> None:
    wrapped = patched(on(model))
    with pytest.raises(ArtefactError, match="merge them into the model first"):
        gazepatch.save(wrapped, tmp_path / "full", full=True)
    expected = logits(wrapped, case)
    merged = wrapped.merge_and_unload()
    loaded = gazepatch.load(gazepatch.save(merged, tmp_path / "full", full=True))
    torch.testing.assert_close(logits(loaded, case), expected, rtol=1e-4, atol=1e-4)


@needs_peft
def test_adapters_that_are_active_together_are_refused(model: Any, tmp_path: Path) -> None:
    settings = peft.LoraConfig(target_modules=r".*language_model.*q_proj", r=2)
    for name in "ab":
        model.add_adapter(settings, adapter_name=name)
    model.set_adapter(["a", "b"])
    with pytest.raises(ArtefactError, match="has one LoRA adapter, got a, b"):
        gazepatch.save(gazepatch.apply(model, SETTINGS, context_tokens=torch.randn(2, 64)), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@needs_peft
def test_adapters_that_would_not_load_are_refused(model: Any, tmp_path: Path) -> None:
    model.add_adapter(peft.LoraConfig(target_modules=r".*language_model.*q_proj", r=2, use_dora=True))
    with pytest.raises(ArtefactError, match=r"got one with DoRA.*merge_and_unload"):
        gazepatch.save(patched(model), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_trained_prompts_are_refused(model: Any, tmp_path: Path) -> None:
    sizes = {"num_virtual_tokens": 2, "token_dim": 64, "num_layers": 2, "num_attention_heads": 4}
    wrapped = patched(peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", **sizes)))
    with pytest.raises(ArtefactError, match="got a prompt that PEFT trained"):
        gazepatch.save(wrapped, tmp_path / "saved")
    assert gazepatch.save(wrapped.get_base_model(), tmp_path / "saved").is_dir()


def test_without_adapters_the_model_is_its_base(case: Case, model: Any) -> None:
    base = logits(model, case)
    assert not has_lora(model)
    wrapped = on(model)
    with torch.no_grad():
        model.lm_head.modules_to_save.default.weight.mul_(1.1)
    adapted = logits(wrapped, case)
    assert has_lora(model)
    with without_lora(model):
        assert torch.equal(logits(wrapped, case), base)
    assert torch.equal(logits(wrapped, case), adapted)
    with wrapped.disable_adapter():
        with without_lora(model):
            pass
        assert torch.equal(logits(wrapped, case), base), "who disabled them enables them"
