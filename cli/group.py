"""The group of commands: looks them up lazily, and turns every failure into one line on stderr and an exit status."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

# Commands in the order of `gazepatch --help`, each in the module of the same name. Their docstrings are the help texts.
COMMANDS = ("inspect", "convert", "push", "verify", "ask", "look", "train", "eval", "bench", "families", "demo")


class Commands(click.Group):
    """A group whose commands are imported on demand. Exit status 2 for bad usage, 1 for a failed run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"gazepatch.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        if DEBUG not in command.params:
            command.params.append(DEBUG)
        return command

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with _one_line(ctx):
            return super().invoke(ctx)


def _debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta["gazepatch.debug"] = True  # which a command and its group share


#: Taken before a command and after it.
DEBUG = click.Option(
    ["--debug"], is_flag=True, expose_value=False, callback=_debug, help="Show the traceback of an error."
)


@contextmanager
def _one_line(ctx: click.Context | None = None) -> Iterator[None]:
    """Whatever goes wrong inside ends as `Error: ...`, and with --debug as a traceback."""
    try:
        yield
    except BrokenPipeError:
        raise  # whoever reads our output has seen enough: click ends in silence
    except click.UsageError as error:
        hint = f" (see {error.ctx.command_path} --help)" if error.ctx is not None else ""
        short = click.UsageError(" ".join(error.format_message().split()) + hint)
        raise short from error  # a context of its own would print the usage as well
    except (click.ClickException, click.exceptions.Exit, click.Abort):
        raise
    except Exception as error:
        if ctx is not None and ctx.meta.get("gazepatch.debug"):
            raise
        raise click.ClickException(_message(error)) from error


def _message(error: Exception) -> str:
    from gazepatch.errors import GazeError

    text = " ".join(str(error).split())
    # Our own messages are made to be read alone; those of others need their type (KeyError: 'x').
    return text if isinstance(error, GazeError) else f"{type(error).__name__}: {text}"


@click.group(
    cls=Commands,
    invoke_without_command=True,
    params=[DEBUG],
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="gazepatch")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Gaze attention for vision-language models: each token reads only the image regions it needs."""
    # A model may say anything, also what the terminal's encoding lacks: that is escaped, as on stderr.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
