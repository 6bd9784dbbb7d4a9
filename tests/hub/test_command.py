"""`gazepatch push`, and `gazepatch convert --push`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from gazepatch.cli import main
from hub.conftest import BASE, REPO, artefact_on, files_in
from hub.state import Hub


def gaze(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command(hub: Hub, artefact: Path) -> None:
    (artefact / "notes.txt").write_text("x")
    dry = gaze("push", artefact, REPO, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert dry.stdout.startswith(f"A dry run: nothing was sent. A push to branch main of {hub.url}/{REPO} would send\n")
    assert "context_tokens.safetensors" in dry.stdout
    assert "It would not send, as not the artefact's: notes.txt" in dry.stdout
    assert hub.writes() == []
    done = gaze("push", artefact, REPO, "--private", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["commit"] == hub.repos[REPO].refs["main"] and report["left_out"] == ["notes.txt"]
    assert hub.repos[REPO].private
    assert "Nothing to do" in gaze("push", artefact, REPO).stdout
    assert gaze("push", artefact, REPO, "--revision", "v2").exit_code == 0 and "v2" in hub.repos[REPO].refs


def test_convert_and_push(hub: Hub, tmp_path: Path) -> None:
    result = gaze("convert", BASE, "-o", tmp_path / "gaze", "--push", REPO, "--json")
    assert result.exit_code == 0, result.output
    assert artefact_on(hub) == files_in(tmp_path / "gaze")
    assert json.loads(result.stdout)["url"].startswith(f"{hub.url}/{REPO}/commit/")
    assert gaze("convert", BASE, "-o", tmp_path / "other", "--push", "others/x").exit_code == 1


def test_what_cannot_be_pushed_is_not_written(hub: Hub, model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "gaze"
    local = gaze("convert", model_folder, "-o", out, "--push", REPO)
    assert local.exit_code == 1 and f"as its base model, {model_folder}, is not published" in local.stderr
    named = gaze("convert", BASE, "-o", out, "--push", "gaze")
    assert named.exit_code == 2 and "repo_id must be owner/name" in named.stderr
    assert not out.exists()
    assert gaze("convert", model_folder, "-o", out, "--full", "--push", REPO).exit_code == 0


def test_errors_of_the_command(hub: Hub, artefact: Path, tmp_path: Path) -> None:
    for status, message, arguments in (
        (2, "repo_id must be owner/name", [artefact, "gaze"]),
        (2, "leave out the revision", [artefact, REPO, "--create-pr", "--revision", "x"]),
        (1, "an artefact is a folder with gaze_config.json", [tmp_path / "nothing", REPO]),
        (1, "may not do that", [artefact, "others/x"]),
    ):
        result = gaze("push", *arguments)
        assert result.exit_code == status and message in result.stderr and result.stdout == ""
        assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
