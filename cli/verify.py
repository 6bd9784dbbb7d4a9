"""`gazepatch verify`."""

from __future__ import annotations

import click

from gazepatch.cli.asked import images_and_prompt, open_images
from gazepatch.cli.opening import base_option
from gazepatch.cli.output import json_option, plain, print_json, print_table
from gazepatch.cli.sample import PROMPT, sample_image


@click.command("verify")
@click.argument("model")
@click.argument("asked", metavar="[IMAGE... PROMPT]", nargs=-1)
@base_option
@json_option
def command(model: str, asked: tuple[str, ...], base: str | None, as_json: bool) -> None:
    """Prove on MODEL that patching does no harm and can be undone.

    Asks about a test image where no IMAGE is given. Exit status 1 when a promise is not kept.
    """
    images, prompt = images_and_prompt(asked, PROMPT)

    import gazepatch
    from gazepatch.cli.opening import open_model, prompt_inputs

    pictures = open_images(images) or [sample_image()]
    patched, processor = open_model(model, base=base)
    report = gazepatch.verify(patched, prompt_inputs(patched, processor, pictures, prompt))
    if as_json:
        checks = [plain(check) | {"passed": check.passed} for check in report.checks]
        print_json({"passed": report.passed, "checks": checks})
    else:
        rows = [
            ("ok" if c.passed else "FAILED", c.name, f"{c.value:.3g}", f"{c.limit:.3g}", c.note) for c in report.checks
        ]
        print_table(("", "promise", "measured", "limit", ""), rows)
    if not report.passed:
        raise click.exceptions.Exit(1)
