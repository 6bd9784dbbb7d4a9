"""`gazepatch ask`."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import click

from gazepatch.cli.asked import check_prompt, entries_read, max_new_tokens_option, open_images, say_notes
from gazepatch.cli.opening import base_option
from gazepatch.cli.output import json_option, print_json
from gazepatch.cli.settings import reading_options

if TYPE_CHECKING:
    from gazepatch.answering import Answer


@click.command("ask")
@click.argument("model")
@click.argument("images", metavar="IMAGE...", nargs=-1, type=click.Path(exists=True, dir_okay=False))
@click.argument("prompt")
@max_new_tokens_option
@click.option("--dense", is_flag=True, help="Let the model's own attention answer.")
@click.option("--compare", is_flag=True, help="Let both answer, one after the other.")
@base_option
@reading_options
@json_option
def command(
    model: str,
    images: tuple[str, ...],
    prompt: str,
    max_new_tokens: int,
    dense: bool,
    compare: bool,
    base: str | None,
    as_json: bool,
    **reading: Any,
) -> None:
    """Ask MODEL about images.

    MODEL is an artefact, or any supported model (a local folder or Hub id), which then gazes with the default settings.
    """
    if dense and compare:
        raise click.UsageError("--dense and --compare exclude each other", click.get_current_context())
    check_prompt(images, prompt)

    from gazepatch.answering import answer
    from gazepatch.cli.opening import open_model, prompt_inputs
    from gazepatch.patch import restored

    pictures = open_images(images)
    patched, processor = open_model(model, reading, base)
    inputs = prompt_inputs(patched, processor, pictures, prompt)
    answers: dict[str, Any] = {}
    for name in ("dense", "gaze") if compare else ("dense",) if dense else ("gaze",):
        show = None if as_json else lambda text: click.echo(text, nl=False)
        with restored(patched) if name == "dense" else nullcontext():
            answers[name] = answer(patched, processor.tokenizer, inputs, max_new_tokens=max_new_tokens, show=show)
        if not as_json:
            read = entries_read(answers[name], images, dense=name == "dense")
            click.echo(f"\n[{name}: {read}, {_times(answers[name])}]")
    if not as_json and images and "gaze" in answers:
        say_notes(patched, inputs)
    if as_json:
        print_json({name: dataclasses.asdict(given) for name, given in answers.items()})


def _times(given: Answer) -> str:
    rate = f", {given.per_token_s * 1000:.1f} ms a token" if given.per_token_s is not None else ""
    return f"{given.first_token_s:.2f} s to the first token{rate}"
