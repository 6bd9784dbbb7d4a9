"""A tiny model that reads, its artefact, and a page for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from tiny_reader import write_reader

import gazepatch
from gazepatch.config import GazeConfig


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reader(tmp_path_factory.mktemp("models") / "reader")


@pytest.fixture(scope="module")
def artefact(base: Path) -> Path:
    return gazepatch.convert(base, base.parent / "reader-gaze", config=GazeConfig(budget=0.5, min_visual_tokens=0))


@pytest.fixture(scope="module")
def page(base: Path) -> Path:
    path = base.parent / "page.png"
    Image.new("RGB", (112, 112)).save(path)
    return path
