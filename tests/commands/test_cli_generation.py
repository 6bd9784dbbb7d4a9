"""What a model's `generation_config.json` says of `generate` does not keep the commands from their work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from commanding import fails, gaze

import gazepatch
from gazepatch.config import GazeConfig

SETTINGS: list[dict[str, Any]] = [{"use_cache": False}, {"num_return_sequences": 2, "num_beams": 2}]
SETTINGS += [{"stop_strings": ["is this is this"]}]


def saying(base: Path, folder: Path, **settings: Any) -> Path:
    """An artefact for a copy of the model with these settings for `generate`."""
    shutil.copytree(base, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    # Transformers looks for stop strings by way of this word, which every tokenizer but one of few words has.
    words = folder / "tokenizer.json"
    words.write_text(words.read_text().replace('"harbour"', '"abcdef"'))
    return gazepatch.convert(folder, folder.with_name("gaze"), config=GazeConfig(budget=0.5, min_visual_tokens=0))


def run(*args: object) -> Any:
    result = gaze(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_commands_gaze_all_the_same(
    base: Path, artefact: Path, page: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    other, asked = saying(base, tmp_path / "other", **settings), (page, "this ?")
    expected, answer = (run("ask", model, *asked, "--max-new-tokens", 4)["gaze"] for model in (artefact, other))
    assert answer["tokens"] == expected["tokens"] and answer["read_share"] == expected["read_share"] < 1
    assert run("look", other, *asked, "--max-new-tokens", 4)["read_share"] == expected["read_share"]
    assert run("bench", other, *asked, "--new-tokens", 4, "--rounds", 1)["read_share"] < 1
    assert run("verify", other, *asked)["passed"]


def test_stop_strings_end_an_answer(base: Path, page: Path, tmp_path: Path) -> None:
    words = run("ask", base, page, "this ?", "--max-new-tokens", 6)["gaze"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    stop = tokenizer.decode(words["tokens"][2:3])
    other = saying(base, tmp_path / "other", stop_strings=[stop])
    answer = run("ask", other, page, "this ?", "--max-new-tokens", 6)["gaze"]
    assert len(answer["tokens"]) <= 3 and answer["text"].endswith(stop.strip())
    timing = run("bench", other, page, "this ?", "--new-tokens", 6, "--rounds", 1)
    assert timing["new_tokens"] == 6  # of a fixed number


def test_stop_strings_that_cannot_be_found(base: Path, page: Path, tmp_path: Path) -> None:
    other = saying(base, tmp_path / "other", stop_strings=["x"])
    said = "expected stop_strings in the model's generation config that its tokenizer can write, got ['x']"
    for command in ("ask", "look"):
        fails(1, said, command, other, page, "this ?", "--json")


def test_a_model_that_keeps_no_cache_is_noted(base: Path, page: Path, tmp_path: Path) -> None:
    other, short = saying(base, tmp_path / "other", use_cache=False), ("--max-new-tokens", 2)
    note = "says use_cache=false, and nothing gazes without a cache: pass use_cache=True to generate"
    assert note in gaze("ask", other, page, "this ?", *short).stdout
    gazing = gazepatch.convert(
        tmp_path / "other", tmp_path / "text", config=GazeConfig(min_visual_tokens=0, prefill="gaze")
    )
    for model in (base, gazing):  # where queries of a prompt gaze, new ones do without a cache too
        assert note not in gaze("ask", model, page, "this ?", *short).stdout
