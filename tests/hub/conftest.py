"""A Hub with one base model, artefacts to push, and a look at what lies there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny

import gazepatch
from gazepatch import GazeConfig
from gazepatch.artefact.card import card_of
from gazepatch.artefact.manifest import read
from hub.server import client_uses, running
from hub.state import Hub, Repo

SETTINGS = GazeConfig(region=(4, 4, 1), window=(2, 2, 1), budget=0.5, min_visual_tokens=0)
BASE, REPO = "lab/tiny", "me/tiny-gaze"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny("llava").model.save_pretrained(folder)
    return folder


@pytest.fixture
def hub(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with one base model."""
    with running() as server:
        client_uses(server.url, tmp_path, monkeypatch)
        server.repos[BASE] = repo = Repo()
        repo.add("main", {path.name: path.read_bytes() for path in model_folder.iterdir()})
        repo.large.add("model.safetensors")
        yield server


def edit(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "gaze_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


@pytest.fixture(scope="session")
def made(model_folder: Path) -> Path:
    """An adapter with context tokens, which names its base model by its Hub id."""
    tokens = torch.randn(4, 64, generator=torch.Generator().manual_seed(4))
    out = gazepatch.convert(model_folder, model_folder.parent / "made", config=SETTINGS, context_tokens=tokens)
    edit(base_model=BASE, key_layout=None)(out)
    (out / "README.md").write_text(card_of(read(out)), encoding="utf-8")
    return out


@pytest.fixture
def artefact(made: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of it. Whatever a test does, what it publishes must be as it was."""
    folder = tmp_path / "artefact"
    shutil.copytree(made, folder)
    yield folder
    assert {name: data for name, data in files_in(folder).items() if name in files_in(made)} == files_in(made)


@pytest.fixture
def full(made: Path, model_folder: Path, tmp_path: Path) -> Path:
    """A full artefact, with the model in several shards."""
    tiny("llava").model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    return gazepatch.convert(tmp_path / "sharded", tmp_path / "full", config=SETTINGS, context_tokens=made, full=True)


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def artefact_on(hub: Hub, ref: str = "main") -> dict[str, bytes]:
    """What a repository holds, but for what the Hub itself puts there."""
    return {path: data for path, data in hub.repos[REPO].files(ref).items() if path != ".gitattributes"}
