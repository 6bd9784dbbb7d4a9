"""`gazepatch eval`."""

from __future__ import annotations

from typing import Any

import click

from gazepatch.cli.opening import base_option
from gazepatch.cli.output import bar_of, json_option, print_json, print_table
from gazepatch.cli.settings import least_option, share_or_number
from gazepatch.config import GazeConfig, budget_text
from gazepatch.errors import ConfigError


def _budgets(ctx: click.Context, param: click.Parameter, value: str | None) -> list[float | int]:
    try:
        budgets = [] if value is None else [share_or_number(part) for part in value.split(",")]
        return [GazeConfig(budget=budget).budget for budget in budgets]
    except ConfigError as error:
        raise click.BadParameter(str(error), ctx, param) from None
    except ValueError:
        raise click.BadParameter(f"expected shares or numbers such as 0.1,0.25,8, got {value!r}", ctx, param) from None


@click.command("eval", short_help="Measure how closely MODEL with gaze follows itself dense.")
@click.argument("model")
@click.argument("data")
@click.option("--budgets", metavar="B,B,...", callback=_budgets, help="Budgets to measure, by default the model's own.")
@click.option("--limit", metavar="N", type=click.IntRange(min=1), help="Read the first N conversations only.")
@base_option
@least_option
@json_option
def command(
    model: str,
    data: str,
    budgets: list[float | int],
    limit: int | None,
    base: str | None,
    as_json: bool,
    **reading: Any,
) -> None:
    """Measure how closely MODEL with gaze follows itself dense, on conversations in DATA.

    MODEL is an artefact, or any supported model, which then gazes with the default settings; DATA what `gazepatch
    train` takes. Conversations are read in one pass, as in a training: what the user says after an image gazes too.
    How much of the images is read is counted for the answers alone.
    """
    import gazepatch
    from gazepatch.cli.opening import open_model
    from gazepatch.training.records import lack_of_images, read_records

    records = read_records(data)  # broken data are found before any weights are read
    if lack := lack_of_images(records):
        click.echo(f"Nothing will gaze: {lack}", err=True)
    patched, processor = open_model(model, reading, base)
    with bar_of("eval", " conversations") as progress:
        scores = gazepatch.evaluate(patched, processor, records, budgets=budgets, limit=limit, progress=progress)
    if as_json:
        print_json(scores)
        return
    head = ("budget", "visual entries read", "agrees with dense", "divergence", "accuracy", "dense accuracy", "tokens")
    rows = [
        (
            budget_text(s.budget),
            "no images" if s.read_share is None else f"{s.read_share:.1%}",
            f"{s.agreement:.1%}",
            f"{s.divergence:.4f}",
            f"{s.accuracy:.1%}",
            f"{s.dense_accuracy:.1%}",
            s.tokens,
        )
        for s in scores
    ]
    print_table(head, rows)
    if whole := scores[0].read_whole:
        minimum = gazepatch.inspect(patched).settings.min_visual_tokens
        click.echo(
            f"{whole} of these conversations were read whole: fewer than min_visual_tokens={minimum} visual tokens"
        )
