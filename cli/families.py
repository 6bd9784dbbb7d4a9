"""`gazepatch families`."""

from __future__ import annotations

import importlib

import click

from gazepatch.cli.output import json_option, print_json, print_table


@click.command("families")
@json_option
def command(as_json: bool) -> None:
    """List the model types that have an adapter."""
    rows = _rows()
    if as_json:
        print_json(rows)
    else:
        cells = [(row["model_type"], row["module"], "yes" if row["video"] else "-", row["layout"]) for row in rows]
        print_table(("model type", "module", "video", "layout"), cells)


def _rows() -> list[dict[str, object]]:
    from transformers import AutoConfig

    from gazepatch.registry import adapter_for, known_types

    rows: list[dict[str, object]] = []
    for model_type in known_types():
        adapter = adapter_for(model_type)
        module = importlib.import_module(type(adapter).__module__)
        rows.append(
            {
                "model_type": model_type,
                "module": module.__name__.removeprefix("gazepatch.adapters."),
                # The default configuration of a family has a token for videos or not.
                "video": bool(adapter.token_ids(AutoConfig.for_model(model_type), "video")),
                "layout": (module.__doc__ or "").strip().partition("\n")[0],
            }
        )
    return rows
