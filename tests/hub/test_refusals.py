"""What `push` refuses before anything is sent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import gazepatch
from gazepatch import ArtefactError, ConfigError, HubError
from hub.conftest import BASE, REPO, SETTINGS, artefact_on, edit
from hub.state import Hub


def linked(folder: Path) -> None:
    (folder / "README.md").rename(folder.parent / "moved.md")
    (folder / "README.md").symlink_to(folder.parent / "moved.md")


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def shorter_shard(folder: Path) -> None:
    save_file({"x": torch.zeros(1)}, first_shard(folder))


def upwards(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../../secret"}}')


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "an artefact is a folder with gaze_config.json, got nothing"),
    "no settings": (lambda f: (f / "gaze_config.json").unlink(), "no gaze_config.json in"),
    "newer": (edit(format_version=2), "format version 2 is newer"),
    "no card": (lambda f: (f / "README.md").unlink(), "must hold README.md"),
    "no tokens": (lambda f: (f / "context_tokens.safetensors").unlink(), "expected a file context_tokens.safetensors"),
    "other tokens": (edit(hidden_size=65), "must have hidden_size 65"),
    "cut tokens": (lambda f: os.truncate(f / "context_tokens.safetensors", 50), "is not a valid safetensors file"),
    "no lora": (edit(provenance={"trainable": "lora"}), "must hold lora/adapter_config.json, lora/adapter_model"),
    "half a lora": (lambda f: (f / "lora").mkdir(), "must hold lora/adapter_config.json"),
    "card is a link": (linked, "is a link to a file outside of the folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "must hold config.json: the artefact is incomplete"),
    "other settings": (
        edit(gaze=replace(SETTINGS, budget=0.1).to_dict()),
        "settings in .*config.json differ from those in gaze_config.json",
    ),
    "no shard": (lambda f: first_shard(f).unlink(), "lacks model-00001-of-"),
    "cut shard": (lambda f: os.truncate(first_shard(f), 2000), "is not a valid safetensors file"),
    "tensors missing": (shorter_shard, "made for a model with key_layout"),
    "no index": (lambda f: (f / "model.safetensors.index.json").unlink(), "got neither"),
    "bad index": (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "must map tensors to shards"),
    "index leads elsewhere": (upwards, "must name safetensors files beside it, got ../../secret"),
}


@pytest.mark.parametrize(("breaking", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_artefacts_are_not_sent(hub: Hub, full: Path, breaking: Callable[[Path], object], message: str) -> None:
    breaking(full)
    with pytest.raises(ArtefactError, match=message):
        gazepatch.push(full, REPO)
    assert hub.requests == []


def test_an_adapter_of_a_folder_here_is_not_sent(hub: Hub, model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ArtefactError, match=r"a folder of this machine as its base.*: write the same adapter .* base=ID"
    ):
        gazepatch.push(gazepatch.convert(model_folder, tmp_path / "gaze"), REPO)
    assert hub.requests == []


@pytest.mark.parametrize("repo", ["", "tiny-gaze", "a/b/c", "me/..", "me/a--b", "me/tiny gaze", "me/x.git", "../x"])
def test_malformed_repositories(hub: Hub, artefact: Path, repo: str) -> None:
    with pytest.raises(ConfigError, match="repo_id must be owner/name"):
        gazepatch.push(artefact, repo)
    assert hub.requests == []


@pytest.mark.parametrize("revision", ["", "a b", "../up", "-x", "a..b", "a//b", "x.lock", "x/", "a~1", "0" * 40])
def test_malformed_revisions(hub: Hub, artefact: Path, revision: str) -> None:
    with pytest.raises(ConfigError, match="revision must be the name of a branch"):
        gazepatch.push(artefact, REPO, revision=revision)
    assert hub.requests == []


def test_a_pull_request_has_no_revision(hub: Hub, artefact: Path) -> None:
    with pytest.raises(ConfigError, match="opened against main"):
        gazepatch.push(artefact, REPO, revision="v1", create_pr=True)


def test_a_card_that_the_hub_refuses(hub: Hub, artefact: Path) -> None:
    path = artefact / "README.md"
    text = path.read_text()
    path.write_text(text.replace(f"base_model: {BASE}", "base_model: /home/me/model"))
    with pytest.raises(HubError, match=r'"base_model" with value "/home/me/model" is not valid.*then push again'):
        gazepatch.push(artefact, REPO)
    assert artefact_on(hub) == {}
    path.write_text(text)
