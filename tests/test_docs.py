"""What the documents say of the commands is what the commands say."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

from gazepatch.cli.group import COMMANDS

ROOT = Path(__file__).parents[1]


def test_the_commands_are_documented() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "commands.py"))
    again = "run python docs/commands.py"
    assert made["PAGE"].read_text(encoding="utf-8") == made["page"](), again
    assert made["README"].read_text(encoding="utf-8") == made["readme"](), again


def test_shell_completion() -> None:
    asked = {"_GAZEPATCH_COMPLETE": "bash_complete", "COMP_WORDS": "gazepatch co", "COMP_CWORD": "1"}
    code = "from gazepatch.cli import main; main(prog_name='gazepatch')"
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True)
    assert run.stdout.split() == [f"plain,{name}" for name in COMMANDS if name.startswith("co")]
