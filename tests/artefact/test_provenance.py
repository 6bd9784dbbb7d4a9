"""How an adapter was trained stays in its manifest and card when it is saved anew, for another place of its base."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapting import needs_peft

import gazepatch
from artefact.conftest import SETTINGS
from gazepatch.artefact.manifest import read
from gazepatch.lora import add_lora

TRAINED = {"trainable": "context", "steps": 7}


def trained(base: Path, out: Path, lora: bool = False) -> Path:
    """An adapter that says it was trained."""
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(base)
    gazepatch.apply(model, SETTINGS, context_tokens=torch.randn(2, 64))
    if lora:
        add_lora(model, model.model.language_model, 2)
    return gazepatch.save(model, out, provenance=TRAINED | {"trainable": "lora"} if lora else TRAINED)


@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=needs_peft)])
def test_it_stays_with_what_was_trained(base: Path, tmp_path: Path, lora: bool) -> None:
    made = trained(base, tmp_path / "made", lora)
    elsewhere = Path(shutil.copytree(base, tmp_path / "elsewhere"))
    model = gazepatch.load(made, base=elsewhere)
    gazepatch.set_budget(model, 0.25)
    with gazepatch.dense(model):
        pass
    saved = gazepatch.save(model, tmp_path / "saved")
    assert read(saved).base_model == str(elsewhere) and read(saved).provenance == read(made).provenance
    for folder in (made, saved):
        assert '"steps": 7' in (folder / "README.md").read_text()
    again = gazepatch.save(gazepatch.load(saved), tmp_path / "again")
    assert read(again).provenance == read(made).provenance
    own = gazepatch.save(gazepatch.load(saved), tmp_path / "own", provenance={"steps": 8})
    assert read(own).provenance == {"steps": 8}


def test_it_survives_a_patch_that_is_made_anew(base: Path, tmp_path: Path) -> None:
    model = gazepatch.load(trained(base, tmp_path / "made"))
    tokens = gazepatch.context_tokens_of(model)
    gazepatch.apply(gazepatch.restore(model), SETTINGS, context_tokens=tokens)
    assert read(gazepatch.save(model, tmp_path / "saved")).provenance == TRAINED


@pytest.mark.parametrize("changed", ["tokens", "no tokens", pytest.param("adapters", marks=needs_peft)])
def test_it_goes_with_what_was_trained(
    base: Path, tmp_path: Path, changed: str, caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = gazepatch.load(trained(base, tmp_path / "made", lora=changed == "adapters"))
    with torch.no_grad():
        if changed == "tokens":
            gazepatch.context_tokens_of(model).add_(1)
        elif changed == "adapters":
            next(tensor for name, tensor in model.named_parameters() if "lora_" in name).add_(1)
        else:
            gazepatch.apply(gazepatch.restore(model), SETTINGS)
    with caplog.at_level(logging.WARNING, "gazepatch"):
        saved = gazepatch.save(model, tmp_path / "saved")
    assert read(saved).provenance is None
    assert "no longer those that were loaded" in caplog.text


def test_a_full_artefact_may_have_been_trained_on(base: Path, tmp_path: Path) -> None:
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(base)
    full = gazepatch.save(gazepatch.apply(model, SETTINGS), tmp_path / "full", full=True, provenance=TRAINED)
    assert read(full).provenance == TRAINED
    assert read(gazepatch.save(gazepatch.load(full), tmp_path / "saved", full=True)).provenance is None
