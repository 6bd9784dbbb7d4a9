"""`gazepatch ask`, and what all commands that answer have in common."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commanding import fails, gaze

import gazepatch
from gazepatch.config import GazeConfig


def test_ask(artefact: Path, page: Path) -> None:
    result = gaze("ask", artefact, page, "what is this ?", "--max-new-tokens", "5")
    assert result.exit_code == 0, result.output
    answer, cost = result.stdout.rstrip().rsplit("\n", 1)
    assert answer.strip()
    assert cost.startswith("[gaze: ") and " of the visual entries read, " in cost and "ms a token" in cost


def test_ask_compares(artefact: Path, page: Path) -> None:
    result = gaze("ask", artefact, page, "what is this ?", "--max-new-tokens", "5", "--compare", "--json")
    assert result.exit_code == 0, result.output
    answers = json.loads(result.stdout)
    assert list(answers) == ["dense", "gaze"]
    assert answers["dense"]["read_share"] is None and 0 < answers["gaze"]["read_share"] < 1
    assert all(len(given["tokens"]) == 5 and given["per_token_s"] > 0 for given in answers.values())


def test_ask_a_plain_model_densely(base: Path, page: Path) -> None:
    dense = json.loads(gaze("ask", base, page, "this", "--max-new-tokens", "5", "--dense", "--json").stdout)
    both = json.loads(gaze("ask", base, page, "this", "--max-new-tokens", "5", "--compare", "--json").stdout)
    assert list(dense) == ["dense"]
    assert dense["dense"]["tokens"] == both["dense"]["tokens"]


def test_ask_compares_with_context_tokens(base: Path, tmp_path: Path, page: Path) -> None:
    artefact = gazepatch.convert(
        base, tmp_path / "gaze", config=GazeConfig(min_visual_tokens=0), context_tokens=torch.ones(2, 32)
    )
    dense = json.loads(gaze("ask", base, page, "this", "--max-new-tokens", "5", "--dense", "--json").stdout)
    both = json.loads(gaze("ask", artefact, page, "this", "--max-new-tokens", "5", "--compare", "--json").stdout)
    assert both["dense"]["tokens"] == dense["dense"]["tokens"] and 0 < both["gaze"]["read_share"] < 1


def test_ask_without_images_reads_everything(artefact: Path) -> None:
    result = gaze("ask", artefact, "what is this ?", "--max-new-tokens", "3")
    assert result.exit_code == 0, result.output
    assert "[gaze: no images to read, " in result.stdout
    assert "[dense: no images to read, " in gaze("ask", artefact, "this", "--max-new-tokens", "3", "--dense").stdout


def test_ask_says_what_was_read(base: Path, artefact: Path, page: Path, tmp_path: Path) -> None:
    for said, model, *options in (
        ("[dense: all visual entries read, ", artefact, "3", "--dense"),
        ("[gaze: 100.0% of the visual entries read, ", base, "3"),
        ("[gaze: nothing read after the prompt, ", artefact, "1"),
    ):
        assert said in gaze("ask", model, page, "this ?", "--max-new-tokens", *options).stdout
    result = gaze("look", artefact, page, "this ?", "--max-new-tokens", 1, "-o", tmp_path / "page.html")
    assert f"[nothing read after the prompt: {tmp_path / 'page.html'}]" in result.stdout


def test_without_room_for_the_page(artefact: Path, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    result = gaze("look", artefact, page, "this ?", "--max-new-tokens", 1, "-o", tmp_path / "page.html")
    assert result.exit_code == 1 and result.stdout.endswith("\n") and list(tmp_path.iterdir()) == []
    said = f"Error: {tmp_path / 'page.html'} cannot be written: No space left on device; choose another place\n"
    assert result.stderr == said


def test_ask_refuses(artefact: Path, page: Path) -> None:
    fails(2, "exclude each other", "ask", artefact, page, "this", "--dense", "--compare")
    fails(2, "does not exist", "ask", artefact, "no.png", "this")
    fails(1, "expected a folder or a Hub id", "ask", "/no/such/model", page, "this")


def test_a_forgotten_prompt(artefact: Path, page: Path) -> None:
    for command in ("ask", "look", "verify", "bench"):
        fails(2, f"PROMPT is missing: {page} is a file", command, artefact, page)
        fails(2, "PROMPT is missing, and there is no file gone.PNG", command, artefact, "gone.PNG")
        fails(2, f"PROMPT is missing: {page} is a file", command, artefact, page, page)


def test_a_prompt_that_is_no_text(artefact: Path, page: Path) -> None:
    for command in ("ask", "look", "verify", "bench"):
        fails(2, "got bytes that are not: if they are UTF-8, set PYTHONUTF8=1", command, artefact, page, "caf\udce9 ?")


def test_a_file_that_is_no_image_is_found_before_the_weights_are_read(
    artefact: Path, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gazepatch, "load", lambda *_: pytest.fail("the weights were read"))
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "half.png").write_bytes(page.read_bytes()[:-30])
    for command in ("ask", "look", "verify", "bench"):
        fails(2, "notes.txt cannot be read as an image: ", command, artefact, tmp_path / "notes.txt", "this")
        fails(2, "half.png cannot be read as an image: ", command, artefact, page, tmp_path / "half.png", "this")


def test_what_is_read_whole_is_said(base: Path, page: Path, tmp_path: Path) -> None:
    said = "visual tokens, fewer than min_visual_tokens=2048: it is read whole (with 0 it would gaze)]"
    short = ("--max-new-tokens", "2")
    assert said in gaze("ask", base, page, "this ?", *short).stdout
    assert said not in gaze("ask", base, page, "this ?", "--dense", *short).stdout
    assert said in gaze("look", base, page, "this ?", *short, "-o", tmp_path / "page.html").stdout
    assert said in gaze("bench", base, page, "this ?", "--new-tokens", "2", "--rounds", "1").stdout


def test_how_much_is_read_can_be_said(base: Path, page: Path, tmp_path: Path) -> None:
    settings = GazeConfig(region=(7, 7, 1), window=None, budget=0.5)
    artefact = gazepatch.convert(base, tmp_path / "gaze", config=settings, context_tokens=torch.ones(2, 32))

    def share(model: Path, *options: str) -> float:
        result = gaze("ask", model, page, "this ?", "--max-new-tokens", "3", "--json", *options)
        assert result.exit_code == 0, result.output
        return float(json.loads(result.stdout)["gaze"]["read_share"])

    assert share(base) == share(artefact) == share(artefact, "--min-visual-tokens", "0", "--budget", "1.0") == 1
    assert share(artefact, "--min-visual-tokens", "0") == 0.5
    assert share(artefact, "--min-visual-tokens", "0", "--budget", "1") == 1 / 16
    assert 0.1 < share(base, "--min-visual-tokens", "0", "--budget", "0.2") < 0.3
    two = ("--min-visual-tokens", "0", "--budget", "2")
    looked = gaze("look", artefact, page, "this ?", "--max-new-tokens", "3", *two, "--json")
    assert json.loads(looked.stdout)["read_share"] == 1 / 8
    timed = gaze("bench", artefact, page, "this ?", "--new-tokens", "3", "--rounds", "1", *two, "--json")
    assert json.loads(timed.stdout)["read_share"] == 1 / 8


def test_a_budget_that_is_none_is_found_before_the_weights_are_read(
    artefact: Path, page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gazepatch, "load", lambda *_: pytest.fail("the weights were read"))
    for command in ("ask", "look", "bench"):
        fails(2, "budget must be a share", command, artefact, page, "this", "--budget", "1.5")
        fails(2, "min_visual_tokens must be an integer", command, artefact, page, "this", "--min-visual-tokens", "-1")


def test_a_processor_that_does_not_do_is_found_before_the_weights_are_read(
    base: Path, artefact: Path, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForImageTextToText

    for place, name in ((gazepatch, "load"), (AutoModelForImageTextToText, "from_pretrained")):
        monkeypatch.setattr(place, name, lambda *_, **__: pytest.fail("the weights were read"))
    for name, missing, message in (
        (
            "silent",
            ("chat_template.jinja",),
            "has no chat template, which says how a prompt reads",
        ),
        ("blind", ("processor_config.json", "chat_template.jinja"), "cannot be loaded: Can't load image processor"),
    ):
        folder = Path(shutil.copytree(base, tmp_path / name))
        for file in missing:
            (folder / file).unlink()
        made = gazepatch.convert(folder, tmp_path / f"{name}-gaze")
        for model in (folder, made):
            fails(1, f"the processor of {folder} {message}", "ask", model, page, "this ?")
            for command in ("verify", "bench"):
                fails(1, message, command, model)


def test_a_tokenizer_alone_is_no_processor(base: Path, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoProcessor, AutoTokenizer

    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *_, **__: AutoTokenizer.from_pretrained(base))
    fails(1, "expected a model with a processor for images and text, got", "ask", base, page, "this ?")


def test_nothing_is_said_on_stderr_where_nobody_watches(artefact: Path, page: Path) -> None:
    arguments = ("ask", artefact, page, "this ?", "--max-new-tokens", 2)
    run = subprocess.run(
        [sys.executable, "-m", "gazepatch.cli", *map(str, arguments)], capture_output=True, text=True, check=True
    )
    assert run.stderr == ""
