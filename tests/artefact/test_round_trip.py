"""What `convert` and `save` write, and that `load` brings it back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
import yaml
from loaded import assert_gazes_like
from tiny import tiny

import gazepatch
from artefact.conftest import SETTINGS
from gazepatch import ArtefactError, PatchError
from gazepatch.artefact.manifest import FORMAT_VERSION, read
from gazepatch.registry import MODULES

# One artefact of every format version, loaded for ever.
GOLDEN = Path(__file__).parents[1] / "golden"


def test_convert_then_load(base: Path, artefact: Path) -> None:
    case = tiny("llava")
    model = gazepatch.load(artefact)
    assert_gazes_like(case, model, SETTINGS)
    gazepatch.restore(model)
    dense = case.model(**case.inputs).logits
    assert torch.equal(model(**case.inputs).logits, dense)


@pytest.mark.parametrize("family", sorted(MODULES))
def test_every_family_goes_round(family: str, tmp_path: Path) -> None:
    """Converted, loaded with no weight missing, verified."""
    try:
        case = tiny(family)
    except KeyError:
        pytest.skip(f"no tiny {family}")
    # Transformers does not load what it saves of shieldgemma2 under the names of the original.
    case.model.save_pretrained(tmp_path / "base", save_original_format=family != "shieldgemma2")
    gazepatch.convert(tmp_path / "base", tmp_path / "gaze")
    manifest = read(tmp_path / "gaze")
    manifest.check(case.model.config)
    assert manifest.model_type == family
    assert manifest.image_geometry
    try:
        model = gazepatch.load(tmp_path / "gaze")
    except ImportError as error:  # towers of timm, for which the tiny model has a stand-in
        pytest.skip(str(error).strip().partition("\n")[0])
    assert gazepatch.verify(model, case.inputs, steps=2).passed


def test_what_is_in_the_folder(base: Path, artefact: Path) -> None:
    assert sorted(path.name for path in artefact.iterdir()) == ["README.md", "gaze_config.json"]
    values = json.loads((artefact / "gaze_config.json").read_text(encoding="utf-8"))
    assert values == {
        "format_version": 1,
        "gazepatch_version": gazepatch.__version__,
        "transformers_version": transformers.__version__,
        "full": False,
        "base_model": str(base),
        "base_revision": None,
        "model_type": "llava",
        "hidden_size": tiny("llava").model.config.text_config.hidden_size,
        "num_hidden_layers": tiny("llava").model.config.text_config.num_hidden_layers,
        "image_geometry": values["image_geometry"],
        "processor_geometry": {},
        "key_layout": values["key_layout"],
        "gaze": SETTINGS.to_dict(),
        "provenance": None,
        "fidelity": None,
    }
    assert values["image_geometry"]["vision_config.patch_size"] == 4
    assert artefact.stat().st_mode & 0o777 == base.stat().st_mode & 0o777


def test_model_card(base: Path, artefact: Path) -> None:
    _, front, body = (artefact / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "gazepatch",
        "pipeline_tag": "image-text-to-text",
        "tags": ["gazepatch", "gaze-attention", "llava"],
    }
    assert "gazepatch.load(" in body and "| `budget` | `0.5` |" in body and "was not measured" in body


def test_save_writes_what_convert_writes(base: Path, artefact: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForImageTextToText.from_pretrained(base)
    with pytest.raises(PatchError, match="not patched"):
        gazepatch.save(model, tmp_path / "saved")
    gazepatch.apply(model, SETTINGS)
    saved = gazepatch.save(model, tmp_path / "saved")
    assert (saved / "gaze_config.json").read_text() == (artefact / "gaze_config.json").read_text()


def test_save_needs_a_base_model(tmp_path: Path) -> None:
    model = gazepatch.apply(tiny("llava").model)
    with pytest.raises(ArtefactError, match=r"save_pretrained\(folder\)"):
        gazepatch.save(model, tmp_path / "saved")


def test_save_needs_to_find_the_base_model(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base.parent)
    model = gazepatch.apply(transformers.AutoModelForImageTextToText.from_pretrained("base"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtefactError, match=r"loaded from 'base', which is neither a folder .*_name_or_path"):
        gazepatch.save(model, tmp_path / "saved")
    assert read(gazepatch.save(model, tmp_path / "full", full=True)).base_model is None
    model.config._name_or_path = str(base)
    assert read(gazepatch.save(model, tmp_path / "saved")).base_model == str(base)


def test_relative_paths_become_absolute(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base.parent)
    out = gazepatch.convert("base", tmp_path / "gaze")
    monkeypatch.chdir(tmp_path)
    assert read(out).base_model == str(base)
    assert gazepatch.is_patched(gazepatch.load("gaze"))


def test_load_passes_arguments_on(artefact: Path) -> None:
    assert gazepatch.load(artefact, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_hub_ids(base: Path, artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(repo: str, **kwargs: Any) -> str:
        asked.update(kwargs, repo=repo)
        return str(artefact)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert gazepatch.is_patched(gazepatch.load("somebody/gaze", revision="v1", token="secret"))
    assert asked == {
        "repo": "somebody/gaze",
        "revision": "v1",
        "allow_patterns": ["gaze_config.json", "README.md", "context_tokens.safetensors", "lora/*"],
        "token": "secret",
    }


@pytest.mark.parametrize("version", [f"v{number + 1}" for number in range(FORMAT_VERSION)])
def test_golden(base: Path, version: str) -> None:
    case = tiny("llava")
    model = gazepatch.load(GOLDEN / version, base=base)
    settings = gazepatch.inspect(model).settings
    assert (settings.budget, settings.head_reduce, settings.dense_layers) == (0.5, "max", (1,))
    assert gazepatch.context_tokens_of(model)[:, 0].tolist() == pytest.approx([-0.8203, 0.1328], abs=1e-4)
    model.generate(**case.inputs, max_new_tokens=3, do_sample=False)
    assert 0.4 < gazepatch.stats(model).read_share < 0.7
