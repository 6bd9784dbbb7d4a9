"""Commands through click's runner."""

from __future__ import annotations

from click.testing import CliRunner, Result

from gazepatch.cli import main


def gaze(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def fails(status: int, message: str, *args: object) -> None:
    result = gaze(*args)
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr
