"""Models whose files lack weights, or hold others than their configuration says, are refused wherever they are opened.

That no model is refused that transformers saved whole: `test_every_family_goes_round` for every model type.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commanding import fails
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import VARIANTS, tiny
from tiny_reader import write_reader

import gazepatch
from gazepatch import ArtefactError, ConfigError, GazeConfig
from gazepatch.artefact.weights import load_model

WEIGHTS = "model.safetensors"
LAST = "model.language_model.layers.1."


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reader(tmp_path_factory.mktemp("models") / "reader")


def lacking(whole: Path, folder: Path) -> str:
    """Write a copy without the last layer; what its refusal says."""
    shutil.copytree(whole, folder)
    tensors = load_file(folder / WEIGHTS)
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}
    save_file(kept, folder / WEIGHTS, {"format": "pt"})
    gone = len(tensors) - len(kept)
    assert gone > 3
    names = f"{LAST}input_layernorm.weight, {LAST}mlp.down_proj.weight, {LAST}mlp.gate_proj.weight"
    return f"expected all weights of the model in {folder}, which lacks {names} and {gone - 3} more: get its files"


def misshapen(whole: Path, folder: Path) -> str:
    """Write a copy that says it were twice as wide; what its refusal says."""
    shutil.copytree(whole, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] *= 2
    (folder / "config.json").write_text(json.dumps(config))
    first = "model.language_model.layers.0.mlp.down_proj.weight [32, 64] in the place of [32, 128], "
    return f"expected the weights in {folder} in the shapes of its config.json, got {first}"


@pytest.mark.parametrize("broken", [lacking, misshapen])
def test_broken_checkpoints_are_refused(whole: Path, tmp_path: Path, broken: Callable[[Path, Path], str]) -> None:
    folder = tmp_path / "broken"
    message = broken(whole, folder)
    artefact = gazepatch.convert(folder, tmp_path / "gaze")
    Image.new("RGB", (112, 112)).save(tmp_path / "page.png")
    turns = [{"role": "user", "content": "<image> this ?"}, {"role": "assistant", "content": "harbour"}]
    (tmp_path / "data.json").write_text(json.dumps([{"messages": turns, "images": ["page.png"]}]))
    for model in (folder, artefact):
        fails(1, message, "ask", model, tmp_path / "page.png", "this ?")
        fails(1, message, "verify", model)
        fails(1, message, "bench", model)
        fails(1, message, "eval", model, tmp_path / "data.json")
    fails(1, message, "train", folder, tmp_path / "data.json", "-o", tmp_path / "out", "--steps", 1)


@pytest.mark.parametrize("broken", [lacking, misshapen])
def test_full_artefacts_are_refused_too(whole: Path, tmp_path: Path, broken: Callable[[Path, Path], str]) -> None:
    message = broken(whole, tmp_path / "broken").partition(" in ")[0]
    full = gazepatch.convert(tmp_path / "broken", tmp_path / "full", full=True)
    with pytest.raises(ArtefactError, match=message):
        gazepatch.load(full)


def test_tensors_without_a_place_are_left_out(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "more"))
    save_file(load_file(folder / WEIGHTS) | {"old.bias": torch.ones(3)}, folder / WEIGHTS, {"format": "pt"})
    assert torch.equal(load_model(folder).lm_head.weight, load_model(whole).lm_head.weight)


def test_arguments_that_concern_missing_weights(whole: Path, tmp_path: Path) -> None:
    misshapen(whole, tmp_path / "broken")
    artefact = gazepatch.convert(tmp_path / "broken", tmp_path / "gaze")
    assert gazepatch.is_patched(gazepatch.load(artefact, ignore_mismatched_sizes=True))
    good = gazepatch.convert(whole, tmp_path / "good", config=GazeConfig())
    assert gazepatch.is_patched(gazepatch.load(good, output_loading_info=False))
    with pytest.raises(ConfigError, match="output_loading_info must be left out: a model is returned alone"):
        gazepatch.load(good, output_loading_info=True)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_what_is_whole_is_loaded(variant: str, tmp_path: Path) -> None:
    tiny(variant).model.save_pretrained(tmp_path / "model")
    load_model(tmp_path / "model")
