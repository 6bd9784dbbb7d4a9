"""`gazepatch convert`."""

from __future__ import annotations

from typing import Any

import click

from gazepatch.cli.output import json_option, print_json
from gazepatch.cli.settings import config_from, options_of
from gazepatch.config import GazeConfig


@click.command("convert")
@click.argument("model")
@click.option("-o", "--out", required=True, metavar="DIR", help="Folder to write; it must not exist yet.")
@click.option("--force", is_flag=True, help="Replace DIR if it is an artefact already.")
@options_of(GazeConfig())
@json_option
def command(model: str, out: str, force: bool, as_json: bool, **settings: Any) -> None:
    """Make a gaze artefact for MODEL, a local folder or Hub id.

    Reads the model's config.json alone, never its weights, and writes a folder of a few kilobytes that
    gazepatch.load and `gazepatch ask` take in place of the model.
    """
    config = config_from(settings, GazeConfig())

    import gazepatch

    folder = gazepatch.convert(model, out, config=config, force=force)
    if as_json:
        print_json({"path": str(folder), "model": model, "gaze": config.to_dict()})
    else:
        click.echo(f"{folder}\nLoad it with gazepatch.load({out!r}), or try: gazepatch ask {out} IMAGE PROMPT")
