"""`gazepatch families`."""

from __future__ import annotations

import click

from gazepatch.cli.output import json_option, print_json, print_table


@click.command("families")
@json_option
def command(as_json: bool) -> None:
    """List the model types that have an adapter."""
    from gazepatch.registry import adapter_for, known_types

    rows = []
    for model_type in known_types():
        adapter = adapter_for(model_type)
        layout = (type(adapter).__doc__ or "").strip().partition("\n")[0]
        module = type(adapter).__module__.removeprefix("gazepatch.adapters.")
        rows.append({"model_type": model_type, "module": module, "layout": layout, "video": adapter.video})
    if as_json:
        print_json(rows)
    else:
        cells = [(row["model_type"], row["module"], row["video"] or "-", row["layout"]) for row in rows]
        print_table(("model type", "module", "video", "layout"), cells)
