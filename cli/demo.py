"""`gazepatch demo`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from gazepatch.cli.output import json_option, print_json


@click.command("demo", short_help="Convert a small model offline and ask it about a page.")
@click.option(
    "--keep",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Build into DIR and leave it there (0.8 GB), for `gazepatch ask DIR/reader-gaze` and for the next demo.",
)
@json_option
def command(keep: Path | None, as_json: bool) -> None:
    """Convert a small model offline and ask it about a page, dense and with gaze.

    Needs the packages of the extra `demo`. Takes about two minutes on two CPU cores.
    """
    from gazepatch.demo.run import run

    readings = run(lambda text: click.echo(text, nl=False, err=as_json), keep)
    if as_json:
        print_json([dataclasses.asdict(reading) for reading in readings])
