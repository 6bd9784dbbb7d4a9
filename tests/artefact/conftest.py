"""A base model, and an artefact of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import tiny

import gazepatch
from gazepatch import GazeConfig

SETTINGS = GazeConfig(region=(4, 4, 1), window=(2, 2, 1), budget=0.5, min_visual_tokens=0, dense_layers=(1,))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model. Tests must leave it alone; `untouched` says whether they did."""
    folder = tmp_path_factory.mktemp("models") / "base"
    tiny("llava").model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def untouched(base: Path) -> Any:
    before = {path: path.stat().st_mtime_ns for path in [base, *base.rglob("*")]}
    yield
    assert {path: path.stat().st_mtime_ns for path in [base, *base.rglob("*")]} == before


@pytest.fixture
def artefact(base: Path, tmp_path: Path) -> Path:
    return gazepatch.convert(base, tmp_path / "gaze", config=SETTINGS)
