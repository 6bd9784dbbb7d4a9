"""What `convert` refuses, and that it leaves nothing half-written behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import gazepatch
from artefact.conftest import SETTINGS
from gazepatch import ArtefactError, ConfigError, GazeConfig, HubError, UnsupportedModelError
from gazepatch.artefact import making
from gazepatch.artefact.manifest import read


@pytest.mark.parametrize("model_type", ["llama", "bert", "never_heard_of"])
def test_other_architectures_are_refused(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UnsupportedModelError, match=f"no adapter for model type '{model_type}'"):
        gazepatch.convert(tmp_path, tmp_path.parent / f"out-{model_type}")
    assert not (tmp_path.parent / f"out-{model_type}").exists()


def test_settings_and_sources_of_other_types(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a GazeConfig, got dict: GazeConfig\.from_dict"):
        gazepatch.convert(base, tmp_path / "gaze", config={"budget": 0.5})  # type: ignore[arg-type]
    with pytest.raises(ArtefactError, match=r"expected a local folder or a Hub id, got a GazeConfig: gazepatch\.save"):
        gazepatch.convert(SETTINGS, tmp_path / "gaze")  # type: ignore[arg-type]
    assert read(gazepatch.convert(base, tmp_path / "gaze", config=SETTINGS, budget=3)).gaze.budget == 3


def test_a_source_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(HubError, match="expected a folder or a Hub id, owner/name, got"):
        gazepatch.convert(tmp_path / "nothing here", tmp_path / "gaze")
    with pytest.raises(ArtefactError, match=r"expected a folder with config.json, got .* without it"):
        gazepatch.convert(tmp_path / "empty", tmp_path / "gaze")
    for text, message in {
        "{": "must be a JSON object",
        "[]": "must be a JSON object, got list",
        "[" * 200_000: "must be a JSON object: ",
        '{"model_type": "llava", "text_config": 3}': "must be the configuration of a llava model",
    }.items():
        (tmp_path / "empty" / "config.json").write_text(text)
        with pytest.raises(ArtefactError, match=message):
            gazepatch.convert(tmp_path / "empty", tmp_path / "gaze")
    assert not (tmp_path / "gaze").exists()


def test_an_artefact_is_not_converted_again(base: Path, artefact: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=f"already: take its base model, {base}$"):
        gazepatch.convert(artefact, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_context_tokens_need_weights(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ask for 4 context tokens, which are trained weights, and none were given"):
        gazepatch.convert(base, tmp_path / "gaze", config=GazeConfig.paper())
    assert not (tmp_path / "gaze").exists()


def test_settings_that_do_not_fit(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dense_layers"):
        gazepatch.convert(base, tmp_path / "gaze", config=GazeConfig(dense_layers=(99,)))
    layers = tuple(range(read(gazepatch.convert(base, tmp_path / "other")).num_hidden_layers))
    with pytest.raises(UnsupportedModelError, match="dense_layers names them all"):
        gazepatch.convert(base, tmp_path / "gaze", config=GazeConfig(dense_layers=layers))
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_existing_output(base: Path, artefact: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="exists already"):
        gazepatch.convert(base, artefact)
    assert read(artefact).gaze == SETTINGS
    gazepatch.convert(base, artefact, force=True)
    assert read(artefact).gaze == GazeConfig()
    assert [path.name for path in tmp_path.iterdir()] == ["gaze"]


def test_force_replaces_nothing_but_artefacts(base: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("more of it")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    for name in ("mine", "file", "link"):
        with pytest.raises(ArtefactError, match="remove it yourself"):
            gazepatch.convert(base, tmp_path / name, force=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_an_empty_folder_is_as_good_as_none(base: Path, tmp_path: Path) -> None:
    (tmp_path / "mounted").mkdir()
    assert read(gazepatch.convert(base, tmp_path / "mounted")).gaze == GazeConfig()
    assert [path.name for path in tmp_path.iterdir()] == ["mounted"]


@pytest.mark.parametrize("name", ["file/gaze", "n" * 250])
def test_a_place_where_nothing_can_be(base: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtefactError, match=r"cannot be written: .*; choose another place"):
        gazepatch.convert(base, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("force", [False, True])
def test_what_comes_into_being_meanwhile_is_not_replaced(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    out, card = tmp_path / "gaze", making.card_of

    def slow(*given: Any) -> str:
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")
        return card(*given)

    monkeypatch.setattr(making, "card_of", slow)
    with pytest.raises(ArtefactError, match="exists already and is no artefact folder"):
        gazepatch.convert(base, out, force=force)
    assert (out / "thesis.txt").read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["gaze"]


@pytest.mark.parametrize("where", [".", "gaze", ".."])
def test_the_base_model_is_never_written_to(base: Path, where: str) -> None:
    with pytest.raises(ArtefactError, match="outside the base model"):
        gazepatch.convert(base, base / where, force=True)


@pytest.mark.parametrize("force", [False, True])
def test_interrupted_writing_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    out = tmp_path / "gaze"
    if force:
        gazepatch.convert(base, out, config=SETTINGS)

    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(making, "card_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gazepatch.convert(base, out, force=force)
    assert [path.name for path in tmp_path.iterdir()] == (["gaze"] if force else [])
    if force:
        assert read(out).gaze == SETTINGS


def test_a_failing_rename_brings_the_old_one_back(
    base: Path, artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if ".new-" in self.name:
            raise OSError("disk on fire")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="disk on fire"):
        gazepatch.convert(base, artefact, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["gaze"]
    assert read(artefact).gaze == SETTINGS
