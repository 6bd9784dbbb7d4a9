"""The adapters that a training puts on: on which layers, in which precision, and refused before anything is trained."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapting import logits, needs_peft, patched, trained
from tiny import Case, tiny

import gazepatch
from gazepatch import ArtefactError, TrainingError
from gazepatch.lora import adapter_layers, add_lora
from gazepatch.lora_checkpoint import load_lora, save_lora
from gazepatch.registry import adapter_for

peft = pytest.importorskip("peft")


@needs_peft
@pytest.mark.parametrize("family", ["deepseek_ocr2", "glm4v_moe", "llama4", "llava", "qwen3_omni_moe_thinker"])
def test_adapters_are_on_the_linear_layers_of_the_decoder(family: str, tmp_path: Path) -> None:
    """And are read back, in families whose layers transformers or PEFT rename as well."""
    case = tiny(family)
    base, decoder = copy.deepcopy(case.model), adapter_for(family).decoder(case.model)
    layers = [part for part in decoder.layers.modules() if type(part) is torch.nn.Linear]
    add_lora(case.model, decoder, 2)
    assert len(layers) > 3 and {layer.get_base_layer() for layer in adapter_layers(case.model)} == set(layers)
    save_lora(trained(case.model), tmp_path / "lora")
    load_lora(base, tmp_path / "lora")
    assert torch.equal(logits(base, case), logits(case.model, case))
    assert not any(held.requires_grad for held in base.parameters())


@needs_peft
def test_adapters_learn_in_single_precision(case: Case, model: Any, tmp_path: Path) -> None:
    model = patched(transformers.AutoModelForImageTextToText.from_pretrained(model.name_or_path, dtype=torch.bfloat16))
    add_lora(model, model.model.language_model, 2)
    case.inputs["pixel_values"] = case.inputs["pixel_values"].bfloat16()
    model(**case.inputs, labels=case.inputs["input_ids"]).loss.backward()
    learning = [held for held in model.parameters() if held.requires_grad]
    assert len(learning) == 2 * len(adapter_layers(model))
    assert {held.dtype for held in learning} == {held.grad.dtype for held in learning} == {torch.float32}
    loaded = gazepatch.load(gazepatch.save(trained(model), tmp_path / "saved"), dtype=torch.bfloat16)
    assert model.dtype == loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded, case), logits(model, case))


@needs_peft
def test_adapters_elsewhere_are_not_trained(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inject, everywhere = peft.inject_adapter_in_model, peft.LoraConfig(target_modules=["q_proj"])
    monkeypatch.setattr(peft, "inject_adapter_in_model", lambda config, model, name, **_: inject(everywhere, model))
    with pytest.raises(TrainingError, match="on all linear layers of the text decoder and nowhere else"):
        add_lora(model, model.model.language_model, 2)


@needs_peft
def test_decoders_without_linear_layers_get_no_adapters(model: Any) -> None:
    model.model.language_model.layers = torch.nn.ModuleList()
    with pytest.raises(TrainingError, match="puts no adapters on this model"):
        add_lora(model, model.model.language_model, 2)


@needs_peft
def test_an_old_peft_is_refused(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = patched(peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2)))
    out = gazepatch.save(wrapped, tmp_path / "saved")
    monkeypatch.setattr("gazepatch.lora.MIN_PEFT_VERSION", "999")
    with pytest.raises(ArtefactError, match=r"need peft 999 or newer, got \d.*pip install -U peft"):
        gazepatch.load(out)
    with pytest.raises(ArtefactError, match="saving LoRA adapters needs peft 999 or newer"):
        gazepatch.save(wrapped, tmp_path / "again")
    with pytest.raises(TrainingError, match="LoRA needs peft 999 or newer"):
        add_lora(model, model.model.language_model, 2)


@needs_peft
def test_models_with_adapters_get_no_more(model: Any, tmp_path: Path) -> None:
    out = gazepatch.save(
        patched(peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))), tmp_path / "saved"
    )
    with pytest.raises(TrainingError, match="adapters on it already"):
        add_lora(model, model.model.language_model, 2)
    with pytest.raises(ArtefactError, match="adapters on it already"):
        load_lora(model, out / "lora")
