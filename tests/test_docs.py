"""What the documents say of the commands is what the commands say."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
from tiny import tiny

import gazepatch
from gazepatch import CacheError
from gazepatch.cli.group import COMMANDS

ROOT = Path(__file__).parents[1]
PYTHON = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_commands_are_documented() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "commands.py"))
    again = "run python docs/commands.py"
    assert made["PAGE"].read_text(encoding="utf-8") == made["page"](), again
    assert made["README"].read_text(encoding="utf-8") == made["readme"](), again


def test_every_public_name_is_documented() -> None:
    assert [name for name in gazepatch.__all__ if not re.search(rf"\b{name}\b", PYTHON)] == []


def test_the_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the page says: one after the other, in the root of a checkout. Only nothing is pushed."""
    pytest.importorskip("PIL")
    pytest.importorskip("accelerate")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gazepatch, "push", create_autospec(gazepatch.push))
    snippets = re.findall(r"^```python\n(.*?)^```", PYTHON, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"snippet {number} of docs/python.md", "exec"), names)
    report = names["report"]
    assert (report.gaze_layers, report.reasons) == ([0, 1, 2, 3], {}) and report.spans[0].grid == (1, 16, 16)
    (note,) = report.notes
    few = "row 0 has 256 visual tokens, fewer than min_visual_tokens=2048"
    assert note == f"{few}: it is read whole (with 0 it would gaze)"
    assert names["share"] == 0.25
    gazepatch.push.assert_called_once_with("digits-full", "you/digits-gaze", private=True)  # type: ignore[attr-defined]


def test_the_first_answer_of_the_readme_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PIL")
    monkeypatch.chdir(ROOT)
    (snippet,) = re.findall(
        r"^```python\n(.*?)^```", README.partition("## A first answer")[2].partition("\n## ")[0], re.M | re.S
    )
    ours = {
        "Qwen/Qwen2.5-VL-3B-Instruct": "examples/digits_vlm/models/dense",
        "page.png": "examples/digits_vlm/boards/00.png",
    }
    for name, stand_in in ours.items():
        assert name in snippet
        snippet = snippet.replace(name, stand_in)
    names: dict[str, Any] = {}
    exec(compile(snippet, "the first answer of README.md", "exec"), names)
    assert 0.25 <= gazepatch.stats(names["model"]).read_share < 0.45
    assert names["answer"].shape[1] > names["inputs"]["input_ids"].shape[1]


def test_static_caches_are_refused_where_the_page_says_so() -> None:
    case = tiny("inkling_mm_model")
    with (
        gazepatch.patched(case.model, min_visual_tokens=0),
        pytest.raises(CacheError, match="StaticFullAttentionLayer"),
    ):
        case.model.generate(**case.inputs, max_new_tokens=2, cache_implementation="static")


def test_shell_completion() -> None:
    asked = {"_GAZEPATCH_COMPLETE": "bash_complete", "COMP_WORDS": "gazepatch co", "COMP_CWORD": "1"}
    code = "from gazepatch.cli import main; main(prog_name='gazepatch')"
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True)
    assert run.stdout.split() == [f"plain,{name}" for name in COMMANDS if name.startswith("co")]
