"""`gazepatch inspect`."""

from __future__ import annotations

import json

import click

from gazepatch.cli.opening import base_option
from gazepatch.cli.output import json_option, print_json, quiet


@click.command("inspect")
@click.argument("model")
@base_option
@json_option
def command(model: str, base: str | None, as_json: bool) -> None:
    """Say which layers of MODEL would gaze, and why others would not.

    MODEL is a local folder or Hub id of a model or an artefact. No weights are read.
    """
    import gazepatch
    from gazepatch.cli.opening import check_base_option, device

    quiet()
    check_base_option(model, base)
    report = gazepatch.inspect(model, device=device(), base=base)
    if as_json:
        print_json(report)
        return
    layers = len(report.gaze_layers) + len(report.reasons)
    click.echo(f"family   {report.family}")
    if report.base_model is not None:
        at = f" at {report.base_revision}" if report.base_revision is not None else ""
        click.echo(f"base     {report.base_model}{at}")
    click.echo(f"decoder  {report.decoder}")
    click.echo(f"backend  {report.backend}")
    click.echo(f"gaze     {len(report.gaze_layers)} of {layers} layers: {_ranges(report.gaze_layers)}")
    for reason in sorted(set(report.reasons.values())):
        stay = [layer for layer, why in report.reasons.items() if why == reason]
        click.echo(f"dense    {_ranges(stay)}: {reason}")
    settings = " ".join(f"{name}={json.dumps(value)}" for name, value in report.settings.to_dict().items())
    click.echo(f"settings {settings}")


def _ranges(numbers: list[int]) -> str:
    """`0-3, 5` for 0, 1, 2, 3, 5."""
    groups: list[list[int]] = []
    for number in sorted(numbers):
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    return ", ".join(str(g[0]) if len(g) == 1 else f"{g[0]}-{g[-1]}" for g in groups) or "none"
