"""`gazepatch look`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from gazepatch.cli.asked import check_prompt, entries_read, max_new_tokens_option, open_images, say_notes
from gazepatch.cli.opening import base_option
from gazepatch.cli.output import json_option
from gazepatch.cli.settings import reading_options

PAGE = Path("gaze.html")


@click.command("look", short_help="Show where MODEL looks while it answers, as a page.")
@click.argument("model")
@click.argument("images", metavar="IMAGE...", nargs=-1, type=click.Path(exists=True, dir_okay=False))
@click.argument("prompt")
@max_new_tokens_option
@click.option(
    "-o",
    "--out",
    metavar="FILE.html",
    type=click.Path(dir_okay=False, path_type=Path),
    help=f"Page to write, in the place of the one that is there.  [default: {PAGE}]",
)
@base_option
@reading_options
@json_option
def command(
    model: str,
    images: tuple[str, ...],
    prompt: str,
    max_new_tokens: int,
    out: Path | None,
    base: str | None,
    as_json: bool,
    **reading: Any,
) -> None:
    """Show where MODEL looks while it answers, as a page for a browser.

    For every token of the answer, the page shows which regions of the images were read, in all layers or in one. It
    holds all it needs, the images too. With --json the same is printed; a page is then written only with --out.
    """
    check_prompt(images, prompt)
    out = PAGE if out is None and not as_json else out
    place = None if out is None else _place(out)

    import gazepatch
    from gazepatch.answering import answer
    from gazepatch.cli.opening import open_model, prompt_inputs
    from gazepatch.files import replace_file, writing
    from gazepatch.viewer import answer_trace, render

    pictures = open_images(images)
    patched, processor = open_model(model, reading, base)
    inputs = prompt_inputs(patched, processor, pictures, prompt)
    show = None if as_json else lambda text: click.echo(text, nl=False)
    with gazepatch.trace(patched) as trace:
        given = answer(patched, processor.tokenizer, inputs, max_new_tokens=max_new_tokens, show=show)
    if not as_json:
        click.echo()
    traced = {"model": model, "prompt": prompt, **answer_trace(given, trace, processor.tokenizer)}
    if place is not None:
        with writing(place):
            replace_file(place, render(traced, pictures, getattr(processor, "image_processor", None)))
    if as_json:
        click.echo(json.dumps(traced))  # a line for each of so many numbers would be long to read
    else:
        click.echo(f"[{entries_read(given, images)}: {out}]")
        if images:
            say_notes(patched, inputs)


def _place(out: Path) -> Path:
    """Where the page is to be written. A place where it cannot be is a usage error."""
    from gazepatch.files import place_of

    try:
        return place_of(out)
    except OSError as error:
        raise click.UsageError(str(error), click.get_current_context()) from None
