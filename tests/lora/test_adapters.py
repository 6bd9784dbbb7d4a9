"""Adapters that somebody put on a model with PEFT: found, saved, loaded again, left out for a while."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapting import SETTINGS, logits, needs_peft, patched, trained
from tiny import Case

import gazepatch
from gazepatch import ArtefactError
from gazepatch.lora import has_lora, without_lora

peft = pytest.importorskip("peft")
functional = pytest.importorskip("peft.functional")


def on(model: Any) -> Any:
    settings = peft.LoraConfig(
        target_modules=r".*language_model.*(q|v)_proj", modules_to_save=["lm_head"], r=2, init_lora_weights=False
    )
    return peft.get_peft_model(model, settings)


ORDERS: dict[str, Callable[[Any], Any]] = {"first": lambda model: patched(on(model)), "last": lambda m: on(patched(m))}


@needs_peft
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
    wrapped = peft.get_peft_model(model, settings, adapter_name="a")
    wrapped.add_adapter("b", settings)
    wrapped.base_model.set_adapter(["a", "b"])
    with pytest.raises(ArtefactError, match="has one LoRA adapter, got a, b active together"):
        gazepatch.save(gazepatch.apply(model, SETTINGS, context_tokens=torch.randn(2, 64)), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


QUERIES: dict[str, Any] = {"target_modules": r".*language_model.*q_proj", "r": 2}
KINDS: dict[str, Any] = {
    "projector": peft.LoraConfig(**QUERIES, modules_to_save=["multi_modal_projector"]),
    "norms": peft.LoraConfig(**QUERIES, modules_to_save=["input_layernorm", "norm"]),
    "tokens": peft.LoraConfig(**QUERIES, trainable_token_indices=[3, 5]),
    "embeddings": peft.LoraConfig(target_modules=["embed_tokens", "q_proj"], r=2),
    "biases": peft.LoraConfig(**QUERIES, bias="all"),
    "DoRA": peft.LoraConfig(**QUERIES, use_dora=True),
    "IA3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


@needs_peft
@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_trains_is_read_back(case: Case, model: Any, kind: str, tmp_path: Path) -> None:
    before = logits(model, case)
    wrapped = patched(trained(peft.get_peft_model(model, copy.deepcopy(KINDS[kind]))))
    expected = logits(wrapped, case)
    assert (expected - before).abs().max() > 0.01
    assert torch.equal(logits(gazepatch.load(gazepatch.save(wrapped, tmp_path / "saved")), case), expected)


@needs_peft
@pytest.mark.parametrize("count", [0, 2])
def test_the_card_tells_of_adapters(case: Case, model: Any, count: int, tmp_path: Path) -> None:
    base = logits(model, case)
    tokens = torch.randn(count, 64) if count else None
    gazepatch.apply(on(model), replace(SETTINGS, context_tokens=count), context_tokens=tokens)
    out = gazepatch.save(model, tmp_path / "saved")
    card = (out / "README.md").read_text()
    assert "`lora/` holds an adapter of PEFT, which stays on the model" in card
    assert "restore(model)  # the base model with its adapter" in card and "exactly" not in card
    assert ("context_tokens.safetensors" in card) == bool(count) and "There are no weights" not in card
    assert not torch.equal(logits(gazepatch.restore(gazepatch.load(out)), case), base)


@needs_peft
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_read_back_in_their_precision(case: Case, model: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model = transformers.AutoModelForImageTextToText.from_pretrained(model.name_or_path, dtype=torch.bfloat16)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**QUERIES), autocast_adapter_dtype=False)
    functional.cast_adapter_dtype(wrapped, "default", dtype == torch.float32)
    out = gazepatch.save(patched(trained(wrapped)), tmp_path / "saved")
    loaded = gazepatch.load(out, dtype=torch.bfloat16)
    assert {held.dtype for name, held in loaded.named_parameters() if "lora_" in name} == {dtype}
    case.inputs["pixel_values"] = case.inputs["pixel_values"].bfloat16()
    assert torch.equal(logits(loaded, case), logits(wrapped, case))


@needs_peft
def test_adapters_of_offloaded_layers_are_refused(model: Any, tmp_path: Path) -> None:
    out = gazepatch.save(patched(peft.get_peft_model(model, peft.LoraConfig(**QUERIES))), tmp_path / "saved")
    rest = dict.fromkeys(("model.vision_tower", "model.multi_modal_projector", "lm_head"), "cpu")
    with pytest.raises(ArtefactError, match=r"got 4 keys of offloaded ones, among them .*layers\.0"):
        gazepatch.load(out, device_map=rest | {"model.language_model": "disk"}, offload_folder=tmp_path / "offloaded")


@needs_peft
def test_adapters_that_could_not_be_read_back_are_refused(model: Any, tmp_path: Path) -> None:
    settings = peft.AdaLoraConfig(target_modules=r".*language_model.*q_proj", init_r=4, target_r=2, total_step=10)
    with pytest.raises(ArtefactError, match=r"got ADALORA of PEFT.*merge_and_unload"):
        gazepatch.save(patched(peft.get_peft_model(model, settings)), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@needs_peft
def test_adapters_of_layers_that_are_not_there_are_refused(model: Any, tmp_path: Path) -> None:
    out = gazepatch.save(patched(peft.get_peft_model(model, peft.LoraConfig(**QUERIES))), tmp_path / "saved")
    path = out / "lora" / "adapter_config.json"
    path.write_text(path.read_text().replace("language_model", "text_model"))
    with pytest.raises(ArtefactError, match=r"text_model.* not found .*or load it with the versions that made it"):
        gazepatch.load(out)


@needs_peft
def test_an_adapter_that_is_not_active_is_refused(model: Any, tmp_path: Path) -> None:
    wrapped = patched(peft.get_peft_model(model, peft.LoraConfig(**QUERIES)))
    wrapped.base_model.set_adapter([])
    with pytest.raises(ArtefactError, match="has one LoRA adapter, got none active"):
        gazepatch.save(wrapped, tmp_path / "saved")


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
