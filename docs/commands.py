"""Write what the commands' help says into docs/commands.md and the README.

python docs/commands.py
"""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from gazepatch.cli import main
from gazepatch.cli.group import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PAGE, README = ROOT / "docs" / "commands.md", ROOT / "README.md"
START, STOP = "<!-- commands -->\n", "<!-- end of commands -->"

HEAD = """\
# Command line

Made from `--help` by `python docs/commands.py`. Tab completion: put
`eval "$(_GAZEPATCH_COMPLETE=bash_source gazepatch)"` into `~/.bashrc` (`zsh_source` and `fish_source` for the others).
"""


def help_of(*names: str) -> str:
    """The help of a command, as a Markdown block of code."""
    result = CliRunner().invoke(main, [*names, "--help"], prog_name="gazepatch", terminal_width=100)
    return f"```\n{result.stdout}```\n"


def page() -> str:
    """The text of docs/commands.md."""
    return "\n".join([HEAD, help_of(), *(f"## {name}\n\n{help_of(name)}" for name in COMMANDS)])


def readme() -> str:
    """The text of the README, with the present list of commands."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(START)
    return f"{before}{START}{help_of()}{STOP}{rest.split(STOP)[1]}"


if __name__ == "__main__":
    made = {PAGE: page(), README: readme()}
    for path, text in made.items():
        path.write_text(text, encoding="utf-8")
