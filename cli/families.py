"""`gazepatch families`."""

from __future__ import annotations

import click

from gazepatch.cli.output import json_option, print_json, print_table

HEAD = ("model type", "images", "videos", "regions", "layers that gaze", "context tokens")


@click.command("families")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print the tables of docs/families.md.")
@json_option
def command(as_markdown: bool, as_json: bool) -> None:
    """List the model types that can gaze, and why others cannot."""
    from gazepatch.families import families, markdown

    rows = families()
    if as_json:
        print_json(rows)
    elif as_markdown:
        click.echo(markdown(rows))
    else:
        supported = [row for row in rows if not row.refused]
        cells = [(r.model_type, r.images, r.videos or "-", r.regions, r.layers, r.context_tokens) for r in supported]
        print_table(HEAD, cells)
        click.echo()
        print_table(("cannot gaze", "because"), [(row.model_type, row.refused) for row in rows if row.refused])
