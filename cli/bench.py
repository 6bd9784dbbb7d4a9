"""`gazepatch bench`."""

from __future__ import annotations

from typing import Any

import click

from gazepatch.cli.asked import images_and_prompt, number_option, open_images, say_notes
from gazepatch.cli.opening import base_option
from gazepatch.cli.output import bar_of, json_option, print_json
from gazepatch.cli.sample import PROMPT, sample_image
from gazepatch.cli.settings import reading_options


@click.command("bench", short_help="Time a token of MODEL here, unpatched and with gaze.")
@click.argument("model")
@click.argument("asked", metavar="[IMAGE... PROMPT]", nargs=-1)
@number_option("--new-tokens", 32, "Tokens to generate each time.", minimum=2)
@number_option("--rounds", 5, "Rounds to time, after one that is not counted.")
@base_option
@reading_options
@json_option
def command(
    model: str, asked: tuple[str, ...], new_tokens: int, rounds: int, base: str | None, as_json: bool, **reading: Any
) -> None:
    """Time a token of MODEL on this machine, unpatched and with gaze, in turn.

    MODEL is an artefact, or any supported model, which then gazes with the default settings. Asks about a test image
    where no IMAGE is given.
    """
    images, prompt = images_and_prompt(asked, PROMPT)

    import gazepatch
    from gazepatch.cli.opening import open_model, prompt_inputs

    pictures = open_images(images) or [sample_image()]
    patched, processor = open_model(model, reading, base)
    inputs = prompt_inputs(patched, processor, pictures, prompt)
    with bar_of("bench", " rounds") as progress:
        timing = gazepatch.bench(patched, inputs, new_tokens=new_tokens, rounds=rounds, progress=progress)
    if as_json:
        print_json(timing)
        return
    click.echo(f"first token   {timing.dense_prompt_ms:8.1f} ms unpatched  {timing.prompt_ms:8.1f} ms with gaze")
    click.echo(f"each further  {timing.dense_token_ms:8.1f} ms unpatched  {timing.token_ms:8.1f} ms with gaze")
    click.echo(
        f"{timing.speedup:.2f} times as fast ({timing.speedup_min:.2f} to {timing.speedup_max:.2f} in {rounds} rounds) "
        f"with {timing.read_share:.1%} of the visual entries read, after a prompt of {timing.prompt_tokens} tokens"
    )
    say_notes(patched, inputs)
