"""What `load` refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import transformers

import gazepatch
from gazepatch import ArtefactError, ConfigError, GazeError, HubError

Change = Callable[[dict[str, Any]], object]
BAD: dict[str, tuple[Change, str]] = {
    "missing key": (lambda v: v.pop("hidden_size"), "missing key: hidden_size"),
    "unknown key": (lambda v: v.update(extra=1), "unknown key: extra"),
    "missing setting": (lambda v: v["gaze"].pop("budget"), "missing key in gaze: budget"),
    "unknown setting": (lambda v: v["gaze"].update(zoom=2), "unknown key in gaze: zoom"),
    "newer format": (lambda v: v.update(format_version=2, new="field"), "format version 2 is newer.*upgrade"),
    "older format": (lambda v: v.update(format_version=0), "format_version must be 1, got 0"),
    "format of wrong type": (lambda v: v.update(format_version="1"), "format_version must be int, got '1'"),
    "format true": (lambda v: v.update(format_version=True), "format_version must be int, got True"),
    "wrong type": (lambda v: v.update(hidden_size="64"), "hidden_size must be int, got '64'"),
    "settings of wrong type": (lambda v: v.update(gaze=[]), "gaze must be dict"),
    "geometry of wrong type": (lambda v: v.update(image_geometry=None), "image_geometry must be dict, got None"),
    "revision of wrong type": (lambda v: v.update(base_revision=7), "base_revision must be str or null"),
    "NaN": (lambda v: v["gaze"].update(budget=float("nan")), "budget must be a share"),
    "infinite": (lambda v: v["gaze"].update(budget=float("inf")), "budget must be a share"),
    "window": (lambda v: v["gaze"].update(window=[3, 3, 1]), "window must divide region"),
    "context tokens": (
        lambda v: v["gaze"].update(context_tokens=4),
        "expected a file context_tokens.safetensors, got nothing at",
    ),
    "other model type": (lambda v: v.update(model_type="qwen2_vl"), "model_type 'qwen2_vl', got 'llava'"),
    "other hidden size": (lambda v: v.update(hidden_size=12345), "hidden_size 12345, got "),
    "other layers": (lambda v: v.update(num_hidden_layers=99), "num_hidden_layers 99, got "),
    "other patches": (
        lambda v: v["image_geometry"].update({"vision_config.patch_size": 14}),
        r"image_geometry vision_config.patch_size = 14, got 4",
    ),
    "base moved": (lambda v: v.update(base_model="/no/such/folder"), "base model folder /no/such/folder not found"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_values(artefact: Path, change: Change, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_weights(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", no_weights)
    path = artefact / "gaze_config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ArtefactError, match=message):
        gazepatch.load(artefact)


TEXTS = {
    "not JSON": ("{", "must be JSON"),
    "empty": ("", "must be JSON"),
    "cut off": ('{"format_version": 1, "gaze": {"bud', "must be JSON"),
    "a list": ("[]", "must be a JSON object, got list"),
    "twice": ('{"format_version": 1, "format_version": 1}', "'format_version' stands there twice"),
    "not UTF-8": ("\udcff", "must be JSON"),
    "nested without end": ("[" * 200_000, "must be JSON: "),
}


@pytest.mark.parametrize(("text", "message"), TEXTS.values(), ids=TEXTS)
def test_bad_files(artefact: Path, text: str, message: str) -> None:
    (artefact / "gaze_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ArtefactError, match=message):
        gazepatch.load(artefact)


def test_things_that_are_no_artefact(base: Path, artefact: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, message in {
        tmp_path / "empty": "no gaze_config.json",
        base: "gazepatch.apply to a plain model",
        artefact / "gaze_config.json": "got a file",
        tmp_path / "nothing": "expected a folder or a Hub id",
    }.items():
        with pytest.raises(GazeError, match=message):
            gazepatch.load(path)


def test_a_folder_has_no_revisions(artefact: Path) -> None:
    with pytest.raises(ConfigError, match="a revision goes with a Hub id, got 'v1' with the local folder"):
        gazepatch.load(artefact, revision="v1")


def test_a_base_that_moved_is_named_by_hand(base: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(base, first)
    out = gazepatch.convert(first, tmp_path / "gaze")
    first.rename(second)
    with pytest.raises(ArtefactError, match=r"gazepatch.load\(..., base=...\) or --base MODEL"):
        gazepatch.load(out)
    assert gazepatch.is_patched(gazepatch.load(out, base=second))


def test_hub_errors_become_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo: str, **kwargs: Any) -> str:
        raise OSError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(HubError, match=r"fetching somebody/gaze failed: .*: no network at all; then try again"):
        gazepatch.load("somebody/gaze")


@pytest.mark.parametrize("given", [{"budget": 0.1}, {"config": gazepatch.GazeConfig()}], ids=str)
def test_settings_are_the_artefacts(artefact: Path, given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"settings of its own, got {next(iter(given))}: .*gazepatch\.set_budget"):
        gazepatch.load(artefact, **given)
