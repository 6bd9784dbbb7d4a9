"""`--base`: an adapter whose base model has moved, on the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from commanding import fails, gaze

import gazepatch
from gazepatch.config import GazeConfig

SETTINGS = GazeConfig(budget=0.5, min_visual_tokens=0)


@pytest.fixture
def moved(base: Path, tmp_path: Path) -> tuple[Path, Path]:
    """An adapter, and where its base model is now."""
    old = Path(shutil.copytree(base, tmp_path / "old"))
    made = gazepatch.convert(old, tmp_path / "gaze", config=SETTINGS)
    return made, old.rename(tmp_path / "new")


def test_every_command_that_opens_a_model_takes_it(moved: tuple[Path, Path], page: Path, tmp_path: Path) -> None:
    adapter, base = moved
    turns = [{"role": "user", "content": "<image> this ?"}, {"role": "assistant", "content": "harbour"}]
    (tmp_path / "data.json").write_text(json.dumps([{"messages": turns, "images": [str(page)]}]))
    for command in (
        ("ask", adapter, page, "this ?", "--max-new-tokens", 2, "--budget", 0.25),
        ("look", adapter, page, "this ?", "--max-new-tokens", 2, "--json"),
        ("verify", adapter, page, "this ?"),
        ("eval", adapter, tmp_path / "data.json"),
        ("bench", adapter, page, "this ?", "--new-tokens", 2, "--rounds", 1),
        ("inspect", adapter),
    ):
        fails(1, "it was moved, or the artefact was made on another machine; say where", *command)
        result = gaze(*command, "--base", base)
        assert result.exit_code == 0, result.output


def test_what_has_weights_of_its_own_has_no_other_base(base: Path, page: Path, tmp_path: Path) -> None:
    full = gazepatch.convert(base, tmp_path / "full", config=SETTINGS, full=True)
    for model in (base, full):
        said = f"--base goes with an adapter, an artefact without weights of its own, which {model} is not"
        for command in (("ask", model, page, "this ?"), ("inspect", model), ("verify", model)):
            fails(2, said, *command, "--base", base)


def test_inspect_takes_a_base_with_the_name_of_an_adapter(moved: tuple[Path, Path]) -> None:
    adapter, base = moved
    assert gazepatch.inspect(adapter, base=base).settings == SETTINGS
    with pytest.raises(gazepatch.GazeError, match="base goes with the name of an adapter artefact"):
        gazepatch.inspect(base, base=base)
    with pytest.raises(gazepatch.GazeError, match="base goes with the name of an adapter artefact"):
        gazepatch.inspect(gazepatch.load(adapter, base=base), base=base)
